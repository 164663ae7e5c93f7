"""What the kernels take: memory and cycles by the TPU's compiler, memory and time on this CPU.

    pip install -e '.[test]'                # libtpu among it, on x86-64 Linux
    python -m benchmarks.kernels memory     # HBM temporaries of a step, ours and others'
    python -m benchmarks.kernels cycles     # the compiler's static estimate, kernel by kernel
    python -m benchmarks.kernels cpu        # the lean twin against the full arrays, run here

Each prints a table in Markdown. No TPU is used: cycles are the compiler's estimate of its own code
(it follows a kernel's grid and its reads of HBM, and knows no contention), not a measured time. Of
v4 it makes none.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks import kernel_programs
from benchmarks.kernel_programs import ATTENTION, HEADS, Head, Heads
from jaxdistill.parallel.ahead_of_time import TOPOLOGIES, Compiled, Program, compile_all

MIB = 2**20
OPERATIONS = ("cross_entropy", "forward_kl", "jensen_shannon", "top_k")
IMPLEMENTATIONS = {"pallas": "ours", "xla": "chunked XLA", "reference": "full arrays"}
OTHERS = {"splash": "jax splash", "flash": "jax flash"}
TILE_KERNELS = ("forward", "query gradient", "key gradient")


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


# ---- Memory -------------------------------------------------------------------------------------


def memory_programs() -> Iterator[tuple[str, str, Program]]:
    """(what, whose, program)."""
    module = kernel_programs.__name__
    for model, head in HEADS.items():
        for operation in OPERATIONS:
            # Of several labels the others scatter, and take the compiler many minutes.
            names = ("pallas",) if operation == "top_k" else tuple(IMPLEMENTATIONS)
            for name in names:
                whose = IMPLEMENTATIONS[name]
                arguments = {"operation": operation, "head": head, "implementation": name}
                program = Program(module, "lower_head", arguments)
                yield f"{operation}, {model}", whose, program
    for model, heads in ATTENTION.items():
        for name, whose in (IMPLEMENTATIONS | OTHERS).items():
            arguments = {"heads": heads, "implementation": name}
            yield f"attention, {model}", whose, Program(module, "lower_attention", arguments)


def print_memory(generations: list[str]) -> None:
    columns = [*IMPLEMENTATIONS.values(), *OTHERS.values()]
    print("HBM temporaries of value and gradients in bfloat16, MiB a chip\n")
    header("", "TPU", *columns)
    programs = list(memory_programs())
    for generation in generations:
        found = compile_all(generation, [program for *_, program in programs])
        cells: dict[str, dict[str, str]] = {}
        for (what, whose, _), result in zip(programs, found, strict=True):
            is_compiled = isinstance(result, Compiled)
            text = f"{result.temporary / MIB:,.1f}" if is_compiled else _why(str(result))
            cells.setdefault(what, {})[whose] = text
        for what, by_whom in cells.items():
            row(what, generation, *(by_whom.get(whose, "") for whose in columns))


def _why(words: str) -> str:
    return "does not fit" if "RESOURCE_EXHAUSTED" in words else "refused"


# ---- Cycles -------------------------------------------------------------------------------------


def print_head_cycles(generation: str) -> None:
    """Each kernel of the fused heads over the products it cannot do without."""
    head = Head(tokens=1024, vocab=8192, width=2048, teacher_width=4096)
    module = kernel_programs.__name__
    programs = [Program(module, "lower_product", {"size": 4096})]
    for operation in OPERATIONS[:-1]:
        arguments = {"operation": operation, "head": head, "implementation": "pallas"}
        programs.append(Program(module, "lower_head", arguments))
    product, *found = compile_all(generation, programs, with_cycles=True)
    if not isinstance(product, Compiled):
        row(generation, "product", "", "", product)
        return
    per_cycle = 2 * 4096**3 / sum(product.cycles.values())
    for operation, result in zip(OPERATIONS, found, strict=False):
        if not isinstance(result, Compiled):
            row(generation, operation, "", "", result)
            continue
        for name, cycles in sorted(result.cycles.items()):
            if "linear_" in name:
                floor = _products(operation, name, head) / per_cycle
                kernel = name.split("linear_")[1].split("_.")[0].strip("_.1")
                ratio = f"{cycles / floor:.2f}"
                row(generation, operation, kernel, f"{cycles:,}", f"{floor:,.0f}", ratio)


def _products(operation: str, name: str, head: Head) -> int:
    """Operations of the products a kernel takes: logits, and one gradient if it is for that."""
    widths = head.width * ("gradient" in name) + head.width
    widths += 0 if operation == "cross_entropy" else head.teacher_width
    return 2 * head.tokens * head.vocab * widths


def print_attention_cycles(generation: str) -> None:
    """Ours against jax's splash attention at equal blocks: 8 heads of one tile each."""
    module = kernel_programs.__name__
    cases = [
        (width, length, kernel)
        for width in (128, 256)
        for length in (512, 1024)
        for kernel in TILE_KERNELS
    ]
    programs = [
        Program(
            module,
            "lower_tile",
            {
                "kernel": kernel,
                "width": width,
                "rows": length,
                "keys": length,
                "heads": 8,
                "ours": ours,
            },
        )
        for width, length, kernel in cases
        for ours in (True, False)
    ]
    found = compile_all(generation, programs, with_cycles=True)
    for case, ours, splash in zip(cases, found[::2], found[1::2], strict=True):
        width, length, kernel = case
        cycles = [
            sum(x.cycles.values()) if isinstance(x, Compiled) else None for x in (ours, splash)
        ]
        counted = cycles[0] is not None and cycles[1] is not None
        ratio = f"{cycles[0] / cycles[1]:.2f}" if counted else ""
        texts = ("not counted" if x is None else f"{x:,}" for x in cycles)
        row(generation, f"{width} wide, tile {length}", kernel, *texts, ratio)


def print_cycles(generations: list[str]) -> None:
    counted = [x for x in generations if x != "v4"]
    print("Fused heads, 1,024 tokens x 8,192 columns, width 2,048 (teacher 4,096), bfloat16\n")
    header("TPU", "operation", "kernel", "cycles", "its products", "ratio")
    for generation in counted:
        print_head_cycles(generation)
    print("\nAttention, causal, 8 heads of one tile each, bfloat16\n")
    header("TPU", "", "kernel", "ours", "jax splash", "ratio")
    for generation in counted:
        print_attention_cycles(generation)


# ---- CPU ----------------------------------------------------------------------------------------


def cpu_programs() -> dict[str, Callable[[str], jax.stages.Lowered]]:
    """Implementation -> value and gradients in float32."""
    head = Head(tokens=1024, vocab=49_152, width=576, teacher_width=576)
    heads = Heads(1, 9, 3, 64, 2048, {})
    programs: dict[str, Callable] = {
        f"{operation}, 1,024 x 576 x 49,152": functools.partial(
            kernel_programs.lower_head, None, operation, list(head), dtype="float32"
        )
        for operation in OPERATIONS
    }
    programs["attention, SmolLM2-135M, 2,048"] = functools.partial(
        kernel_programs.lower_attention, None, list(heads), dtype="float32"
    )
    return programs


def arrays_for(lowered: jax.stages.Lowered) -> list[jax.Array]:
    """Numbers in the shapes of its arguments; integers are 0, log-probabilities even."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    infos = jax.tree.leaves(lowered.args_info)

    def filled(info: jax.stages.ArgInfo) -> jax.Array:
        if jnp.issubdtype(info.dtype, jnp.integer):
            several = info.shape[-1] if len(info.shape) == 2 else 1
            return jnp.broadcast_to(jnp.arange(several, dtype=info.dtype), info.shape)
        if info.shape[-1] == kernel_programs.TOP_K and len(info.shape) == 2:
            return jnp.full(info.shape, -jnp.log(2.0 * kernel_programs.TOP_K))
        return jax.random.normal(next(keys), info.shape, info.dtype) / info.shape[-1] ** 0.5

    return [filled(info) for info in infos]


def seconds(lowered: dict[str, jax.stages.Lowered], repeats: int) -> dict[str, float]:
    """Medians, run in turn so that whatever else the machine does meets all of them."""
    compiled = {name: x.compile() for name, x in lowered.items()}
    arrays = arrays_for(next(iter(lowered.values())))
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(repeats + 1):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in times.items()}


def print_cpu(repeats: int) -> None:
    print("Value and gradients in float32 on this CPU: the lean twin, and full arrays\n")
    header("", "MiB, lean", "full", "ratio", "seconds, lean", "full", "ratio")
    for what, program in cpu_programs().items():
        lowered = {name: program(name) for name in ("xla", "reference")}
        memory = {}
        for name, x in lowered.items():
            analysis = x.compile().memory_analysis()
            assert analysis is not None, "this backend gives no account of its memory"
            memory[name] = analysis.temp_size_in_bytes / MIB
        times = seconds(lowered, repeats)
        cells = []
        for numbers, digits in ((memory, 0), (times, 2)):
            lean, full = numbers["xla"], numbers["reference"]
            cells += [f"{lean:,.{digits}f}", f"{full:,.{digits}f}", f"{lean / full:.2f}"]
        row(what, *cells)
    print("\nKD at 8,192 x 151,936, widths 2,048 and 4,096, bfloat16: compiled, not run\n")
    header("", "MiB, lean", "full", "ratio")
    for operation in ("cross_entropy", "forward_kl", "reverse_kl"):
        lean, full = (
            kernel_programs.lower_head(None, operation, HEADS["Qwen3-1.7B of 8B"], name)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            / MIB
            for name in ("xla", "reference")
        )
        row(operation, f"{lean:,.0f}", f"{full:,.0f}", f"{lean / full:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("memory", "cycles", "cpu"))
    parser.add_argument("--generations", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, on the CPU")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is here, a TPU is not
    if options.table == "memory":
        print_memory(options.generations)
    elif options.table == "cycles":
        print_cycles(options.generations)
    else:
        print_cpu(options.repeats)


if __name__ == "__main__":
    main()
