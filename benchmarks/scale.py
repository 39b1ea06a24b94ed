"""Estimate the time of training on ImageNet with 1, 8 and 64 GPUs from a few figures.

    python -m benchmarks.scale                       # the tables of docs/scale.md
    python -m benchmarks.scale --utilization 0.3 --decoded 250

Nothing is measured: the figures are flags, with their sources in the help.
"""

import argparse
import math

from Training.console import entry_point, run_program

TRAIN_IMAGES = 1_281_167
PAPER_IMAGES = 530_000 * 256  # Wang et al. 2017, section 4.2: 530k steps; 256 images per step is our choice
NVLINK_GPUS = 8  # GPUs of one machine


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--multiply-adds", type=float, default=6_270_836_736, help="for one image, forward: python -m Model"
    )
    parser.add_argument("--weights", type=float, default=31_810_728, help="trainable weights: python -m Model")
    parser.add_argument("--matrix-rate", type=float, default=790e12, help="FLOP/s of a GPU's bfloat16 matrix products")
    parser.add_argument(
        "--utilization", type=float, help="share of that rate in training (default: 0.15, 0.25 and 0.35)"
    )
    parser.add_argument("--batch", type=int, default=256, help="images per GPU and step")
    parser.add_argument("--link", type=float, default=450e9, help="bytes/s of a GPU to others in its machine")
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s of a GPU to others in other machines")
    parser.add_argument("--decoded", type=float, help="images/s that a CPU core decodes: python -m benchmarks.folder")
    return parser


def estimate(flags, utilization, gpus):
    """Return images/s, ms of compute per step, MB and ms of all-reduce, days of the paper's run, days of 90 epochs."""
    compute = flags.batch * 3 * 2 * flags.multiply_adds / (flags.matrix_rate * utilization)  # backward is twice forward
    volume = 2 * (gpus - 1) / gpus * flags.weights * 4
    link = flags.link if gpus <= NVLINK_GPUS else flags.network
    reduce = volume / link
    rate = gpus * flags.batch / (compute + reduce)
    days = [images / rate / 86_400 for images in (PAPER_IMAGES, 90 * TRAIN_IMAGES)]
    return rate, compute * 1e3, volume / 1e6, reduce * 1e3, *days


@entry_point("python -m benchmarks.scale")
def main(arguments=None):
    flags = make_parser().parse_args(arguments)
    print("| GPUs | MFU | compute, ms | reduce, MB | reduce, ms | images/s | paper's run, days | 90 epochs, days |")
    print("|---|---|---|---|---|---|---|---|")
    rates = []
    for gpus in (1, 8, 64):
        for utilization in [flags.utilization] if flags.utilization else (0.15, 0.25, 0.35):
            rate, compute, volume, reduce, paper, long = estimate(flags, utilization, gpus)
            print(
                f"| {gpus} | {utilization:.0%} | {compute:.1f} | {volume:.0f} | {reduce:.2f} | {rate:,.0f} "
                f"| {paper:.3f} | {long:.3f} |"
            )
            rates.append((gpus, utilization, rate))
    if flags.decoded:
        for gpus, utilization, rate in rates:
            cores = math.ceil(rate / flags.decoded)
            print(f"{gpus} GPUs at {utilization:.0%}: {cores:,} cores to decode {rate:,.0f} images/s")


if __name__ == "__main__":
    run_program(main)
