"""jaxdistill: a functional JAX/TPU-native stack to distil and post-train models.

Importing it sets no environment variable and touches no device.
"""

from jaxdistill._version import __version__

__all__ = ["__version__"]
