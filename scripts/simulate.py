#!/usr/bin/env python3
"""Simulates serving under both scheduling policies, or measures what scheduling costs.

    python scripts/simulate.py                              tables and one JSON line
    python scripts/simulate.py --plot docs/simulation.png   and a plot; needs matplotlib
    python scripts/simulate.py --requests 100000 --loads 0.9
    python scripts/simulate.py --overhead --check           goal: 1 ms at 1,000 sequences

The scheduler and the KV cache are the real ones; the device, its clock and the traffic are not (see
simulation.py). Loads are shares of what the device serves at most, which is measured first by a
run in which everything arrives at once, over the middle half of its requests. Scheduling is timed
in CPU time of the thread, which other work on the machine hardly lengthens. With --check the exit
code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from simulation import CPU, H200, Device, Report, Simulation, Workload, measure_overhead, percentile

from llmserve.config import CapacitySchedulerPolicy

POLICIES: tuple[CapacitySchedulerPolicy, ...] = get_args(CapacitySchedulerPolicy)
TRACES = {"Poisson": 1.0, "bursty": 4.0}
MOST_OVERHEAD_S = 1e-3
OVERHEAD_AT = 1000

# Where K and V are plenty, the batch size is the limit and the policies hardly differ.
SCENARIOS: dict[str, tuple[Device, float]] = {
    CPU.name: (CPU, 1.0),
    H200.name: (H200, 1.0),
    f"{H200.name}, 1/8 of the KV cache": (H200, 1 / 8),
}


def main() -> int:
    """Run what was asked for; returns the exit code."""
    args = _arguments()
    hardware = {"machine": platform.machine(), "python": platform.python_version()}
    print(" ".join(f"{name} {value}" for name, value in hardware.items()))
    missed = []
    if args.overhead:
        result: dict[str, Any] = {"overhead": [_overhead(n, args.steps) for n in args.sequences]}
        means = {row["sequences"]: row["mean_s"] for row in result["overhead"]}
        if means.get(OVERHEAD_AT, 0.0) > MOST_OVERHEAD_S:
            missed.append(f"schedule plus update took {means[OVERHEAD_AT] * 1e3:.2f} ms")
    else:
        result = {"runs": _simulate(args)}
        if args.plot:
            _plot(result["runs"], args.plot)
    for goal in missed:
        print(f"missed: {goal}", file=sys.stderr)
    print(json.dumps(hardware | result | {"missed": missed}))
    return 1 if args.check and missed else 0


def _simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for scenario, (device, kv_cache_share) in SCENARIOS.items():
        if args.device and args.device not in scenario:
            continue

        def serve(
            policy: CapacitySchedulerPolicy,
            workload: Workload,
            device: Device = device,
            share: float = kv_cache_share,
        ) -> Report:
            return Simulation(device, policy, kv_cache_share=share).run(workload)

        workload = Workload(requests_per_s=1e6, num_requests=args.requests, seed=args.seed)
        most = serve(POLICIES[0], replace(workload, num_requests=6 * device.max_batch_size)).rate
        print(f"\n{scenario}: at most {most:.3g} requests/s\n{_HEADER}")
        for trace in args.traces:
            for load in args.loads:
                for policy in args.policies:
                    offered = replace(
                        workload, requests_per_s=load * most, burstiness=TRACES[trace]
                    )
                    row = {"scenario": scenario, "trace": trace, "load": load, "policy": policy}
                    row |= _row(serve(policy, offered), offered)
                    rows.append(row)
                    print(_line(row), flush=True)
    return rows


def _row(report: Report, workload: Workload) -> dict[str, Any]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "requests": len(report.lives),
        "offered_requests_per_s": workload.requests_per_s,
        "requests_per_s": report.rate,
        "output_tokens_per_s": report.output_tokens_per_s,
        "ttft_s": {name: report.ttft_s(share) for name, share in shares.items()},
        "batch_ttft_s": {name: report.ttft_s(s, batch=True) for name, s in shares.items()},
        "tpot_s": {name: report.tpot_s(share) for name, share in shares.items()},
        "preemptions": report.stats.num_preemptions,
        "prefix_hit_rate": report.hit_rate,
        "mean_batch_size": fmean(report.batch_sizes),
        "steps": len(report.batch_sizes),
        "scheduling_s": {name: percentile(report.scheduling_s, s) for name, s in shares.items()},
        "scheduling_by_batch_size": _by_batch_size(report),
        "simulated_s": report.duration_s,
        "wall_s": report.wall_s,
    }


def _by_batch_size(report: Report) -> dict[str, dict[str, float]]:
    bounds = (0, 16, 64, 256, 1024)
    result = {}
    for low, high in pairwise(bounds):
        times = [
            seconds
            for seconds, size in zip(report.scheduling_s, report.batch_sizes, strict=True)
            if low < size <= high
        ]
        if times:
            result[f"{low + 1}-{high}"] = {
                "steps": len(times),
                "p50_s": percentile(times, 0.5),
                "p99_s": percentile(times, 0.99),
            }
    return result


_HEADER = (
    "trace    load policy               tokens/s   TTFT p50/p90/p99 ms   batch TTFT p99 s  "
    "TPOT p50/p90/p99 ms  paused  hits  batch  scheduling p50/p99 ms"
)


def _line(row: dict[str, Any]) -> str:
    def times(name: str, digits: int) -> str:
        return "/".join(f"{seconds * 1e3:.{digits}f}" for seconds in row[name].values())

    scheduling = row["scheduling_s"]
    return (
        f"{row['trace']:8} {row['load']:4} {row['policy']:20} {row['output_tokens_per_s']:9.0f}"
        f" {times('ttft_s', 0):>21} {row['batch_ttft_s']['p99']:18.2f}"
        f" {times('tpot_s', 1):>20} {row['preemptions']:7} {row['prefix_hit_rate']:5.0%}"
        f" {row['mean_batch_size']:6.0f}"
        f" {scheduling['p50'] * 1e3:10.2f}/{scheduling['p99'] * 1e3:.2f}"
    )


def _overhead(num_running: int, num_steps: int) -> dict[str, Any]:
    # Long answers that end here and there, as in a batch that has been served for a while.
    times = measure_overhead(num_running, num_steps, answer_tokens=256)
    row = {
        "sequences": num_running,
        "steps": len(times),
        "mean_s": fmean(times),
        **{f"p{share}_s": percentile(times, share / 100) for share in (50, 90, 99)},
    }
    shown = ", ".join(
        f"{name[:-2]} {row[name] * 1e3:.3f}" for name in ("mean_s", "p50_s", "p90_s", "p99_s")
    )
    print(f"{num_running:5} sequences: schedule plus update, ms a step: {shown}", flush=True)
    return row


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    panels = {
        "output tokens/s": lambda row: row["output_tokens_per_s"],
        "TTFT p99 of interactive requests, s": lambda row: row["ttft_s"]["p99"],
        "TPOT p99, ms": lambda row: row["tpot_s"]["p99"] * 1e3,
        "pauses per request": lambda row: row["preemptions"] / row["requests"],
    }
    size = (4 * len(panels), 3.2 * len(scenarios))
    figure, axes = plt.subplots(
        len(scenarios), len(panels), figsize=size, squeeze=False, layout="constrained"
    )
    # Where both policies do the same, the thin line lies on the thick one.
    looks = dict(zip(POLICIES, (("tab:blue", 4, 0.5), ("tab:orange", 1.5, 1)), strict=True))
    for line, scenario in zip(axes, scenarios, strict=True):
        for axis, (title, value) in zip(line, panels.items(), strict=True):
            for trace, style in zip(TRACES, ("-", "--"), strict=True):
                for policy in POLICIES:
                    points = [
                        (row["load"], value(row))
                        for row in rows
                        if (row["scenario"], row["trace"], row["policy"])
                        == (scenario, trace, policy)
                    ]
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        marker="o",
                        markersize=3,
                        color=looks[policy][0],
                        linewidth=looks[policy][1],
                        alpha=looks[policy][2],
                        label=f"{policy}, {trace}",
                    )
            axis.set_title(f"{scenario}\n{title}", fontsize=9)
            axis.set_xlabel("offered load, share of the most it serves", fontsize=8)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=90)
    print(f"plotted to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000, help="of each run")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.1])
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--device", help="only scenarios with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a PNG")
    parser.add_argument("--overhead", action="store_true", help="measure scheduling alone")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256, OVERHEAD_AT])
    parser.add_argument("--steps", type=int, default=1000, help="to measure with --overhead")
    parser.add_argument("--check", action="store_true", help="fail if a goal is missed")
    return parser.parse_args()


if __name__ == "__main__":
    gc.freeze()  # what was imported: the collector need not look at it in every round
    sys.exit(main())
