"""The tables of bench/results/gpu_ledger.md, from gpu_ledger.json."""

from typing import Any

Row = dict[str, Any]
HEAD = """# Kernels against the same work by others: PREDICTED, NOT MEASURED

Made by `python -m bench.ledger` from gpu_ledger.json; no number here was timed. Bytes are counted: *memory* as if each
launch read and wrote each byte of a tensor once, *requested* as the programs ask, again each time (a library's product:
as tiles of 128 x 256 would). The time is the floor of an H100 SXM: the largest of memory / 3.35 TB/s, FLOPs / 990
TFLOP/s (67 in float32), exponentials / 4.2 T/s and 3 us a launch. Registers, stack, spilling instructions in loops,
shared memory and occupancy are what ptxas made for sm_90, the worst of a call's kernels. torch.compile: bytes as
inductor's scheduler groups the eager work. Shapes are full ones: SmolLM2-135M's, and where named Llama-8B's. The price
of an exact product (`--exact_logprobs`) lies in what it requests: its tiles are smaller than a library's, its floor is
the same.
"""

# Ops of which the engine is to move the fewest bytes of all that do the whole work.
BAR = ("linear_logprob", "ppo_policy_loss", "ppo_value_loss", "kl_reward_gae")
SIZES = ("24 GB", "80 GB", "8 x 80 GB")  # of what a plan's row says whether it fits


def number(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _cells(row: Row) -> list[str]:
    if "memory" not in row:
        return [row["by"], *["–"] * 5, f"cannot: {row.get('refused', '')[:60].strip()}", *["–"] * 4]
    code = "–"
    if "registers" in row:
        numbers = [str(row[name]) for name in ("registers", "stack", "local_in_loop", "shared")]
        code = " / ".join([*numbers, f"{row['occupancy']:.0%}"])
    name = row["by"] + (f" ({row['lacks']})" if row.get("lacks") else "")
    return [
        name,
        number(row["memory"]),
        f"{row['memory'] / row['compulsory']:.2f}" if row["compulsory"] else "–",
        f"{row['bytes_to_engine']:.2f}" if "bytes_to_engine" in row else "–",
        number(row["requested"]),
        number(row["flops"]),
        str(row["launches"]),
        code,
        f"{row['predicted_ms']:.3g}",
        row["bound"],
        f"{row['time_to_engine']:.2f}" if "time_to_engine" in row else "–",
    ]


COLUMNS = [
    "by", "memory, B", "to compulsory", "to engine", "requested, B", "FLOPs", "launches",
    "registers / stack / spills in loops / shared / occupancy", "ms at least", "bound by", "to engine",
]  # fmt: skip


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page(record: dict[str, Any]) -> str:
    """The whole file."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault((row["op"], row["case"]), []).append(row)
    parts = [HEAD]
    for (op, case), rows in groups.items():
        shape = ", ".join(f"{k} {v}" for k, v in rows[0]["shape"].items())
        least = next((row["compulsory"] for row in rows if "compulsory" in row), 0)
        parts.append(
            f"## {op}, {case}: predicted, not measured\n\n{shape}; {rows[0]['dtype']}; compulsory {number(least)}B\n\n"
            + _table(COLUMNS, [_cells(row) for row in rows])
        )
    return "\n".join([*parts, _whole_calls(record["rows"]), _plan(record["plan"])])


def totals(rows: list[Row], op: str, bytes_of: str = "memory") -> dict[str, dict[str, float]]:
    """shape -> by -> bytes ("memory" or "requested") over all phases, of those that do all that the engine does."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["op"] == op and "memory" in row:
            shape = row["case"].partition(", ")[2]
            found.setdefault(shape, {}).setdefault(row["by"], {})[row["case"]] = row[bytes_of]
    return {
        shape: {
            by: sum(phases.values())
            for by, phases in moved.items()
            if phases.keys() == moved["engine"].keys()
        }
        for shape, moved in found.items()
    }


def _whole_calls(rows: list[Row]) -> str:
    """Who moves how much in all phases together, and what their work lacks."""
    lacks = {(row["op"], row["by"]): row.get("lacks", "") for row in rows}
    body = []
    for op in BAR:
        requested = totals(rows, op, "requested")
        for shape, moved in totals(rows, op).items():
            asked = requested[shape]
            for by, total in sorted(moved.items(), key=lambda pair: pair[1]):
                ratios = f"{total / moved['engine']:.2f}", f"{asked[by] / asked['engine']:.2f}"
                cells = number(total), ratios[0], number(asked[by]), ratios[1]
                body.append([op, shape or "–", by, *cells, lacks[op, by] or "–"])
    text = (
        "## Forward and backward together: predicted, not measured\n\n"
        "Bytes over all phases of a call. The engine's are the fewest: against the programs of libraries, which go"
        " through the same counter, by what they load and store (*requested*, also where they do less of the work);"
        " against torch's operations by what each reads and writes (*memory*). Two are below the engine by the other"
        " count. cut-cross-entropy's memory: it never writes the gradients of the logits, but adds to its results under"
        " locks, in another order at each run, in bfloat16 and without entropy. torch.compile's requests: it keeps the"
        " logits, tokens x vocabulary, where the engine makes them again.\n\n"
    )
    columns = ["op", "shape", "by", "memory, B", "to engine", "requested, B", "to engine", "lacks"]
    return text + _table(columns, body)


def _plan(rows: list[Row]) -> str:
    phases = list(rows[0]["memory_gb"])
    times = list(rows[0]["seconds"])
    text = (
        "## A PPO iteration on one H100: predicted, not measured\n\n"
        "512 episodes of 256 + 256 tokens, 4 minibatches, micro-batches of 8,192 tokens, 256 sequences at a time; what"
        " is trained holds 18 bytes a parameter, the policy's average 4, what is frozen 2 (bench/ledger_plan.py).\n\n"
    )
    head = [
        "policy, reward and value",
        *[f"{p}, GB" for p in phases],
        *SIZES[:2],
        f"{SIZES[2]}, sharded",
    ]
    body = [
        [
            f"{row['policy']}, {row['reward and value']}",
            *[f"{row['memory_gb'][p]:.1f}" for p in phases],
            *(row["fits"][size] for size in SIZES),
        ]
        for row in rows
    ]
    text += _table(head, body) + "\n"
    head = ["policy, reward and value", *[f"{p}, s" for p in times], "all, s"]
    body = [
        [
            f"{row['policy']}, {row['reward and value']}",
            *[f"{row['seconds'][p]:.2f}" for p in times],
            f"{row['seconds_total']:.1f}",
        ]
        for row in rows
    ]
    return text + _table(head, body)
