"""The whole check in one command, `python -m tests`: format, lint, types, then pytest.

Further arguments go to pytest, as in `python -m tests -m slow`.
"""

import subprocess
import sys

CHECKS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("mypy",),
)


def main() -> int:
    for check in (*CHECKS, ("pytest", *sys.argv[1:])):
        print(f"$ {' '.join(check)}", flush=True)
        if status := subprocess.call([sys.executable, "-m", *check]):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
