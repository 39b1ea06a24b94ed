"""What training on ImageNet would take on 1, 8 and 64 GPUs, as arithmetic from a few figures.

    python -m benchmarks.scale                       # the tables of docs/scale.md
    python -m benchmarks.scale --utilization 0.3 --decoded 250

Nothing is run: the figures that go in are flags with their source in the help.
"""

import argparse
import math

from Training.console import entry_point, run_program

TRAIN_IMAGES = 1_281_167
PAPER_IMAGES = 530_000 * 256  # Wang et al. 2017, section 4.2: 530k steps; 256 images a step is our choice
NVLINK_GPUS = 8  # GPUs of one machine


def parser():
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument(
        "--multiply-adds", type=float, default=6_270_836_736, help="of one image forward: python -m Model"
    )
    made.add_argument("--weights", type=float, default=31_810_728, help="trainable: python -m Model")
    made.add_argument(
        "--matrix-rate", type=float, default=790e12, help="FLOP/s in bfloat16 that a GPU's matmul reaches"
    )
    made.add_argument("--utilization", type=float, help="share of it that training reaches; else 0.15, 0.25, 0.35")
    made.add_argument("--batch", type=int, default=256, help="images a GPU and step")
    made.add_argument("--link", type=float, default=450e9, help="bytes/s of one GPU to those of its machine")
    made.add_argument("--network", type=float, default=50e9, help="bytes/s of one GPU to those of other machines")
    made.add_argument("--decoded", type=float, help="images/s that one CPU core decodes: benchmarks/folder.py")
    return made


def row(flags, utilization, gpus):
    """`(images/s, ms of compute a step, MB and ms of all-reduce, days of the paper's run, days of 90 epochs)`."""
    compute = flags.batch * 3 * 2 * flags.multiply_adds / (flags.matrix_rate * utilization)  # backward is twice forward
    volume = 2 * (gpus - 1) / gpus * flags.weights * 4
    link = flags.link if gpus <= NVLINK_GPUS else flags.network
    reduce = volume / link
    rate = gpus * flags.batch / (compute + reduce)
    days = [images / rate / 86_400 for images in (PAPER_IMAGES, 90 * TRAIN_IMAGES)]
    return rate, compute * 1e3, volume / 1e6, reduce * 1e3, *days


@entry_point("python -m benchmarks.scale")
def main(arguments=None):
    flags = parser().parse_args(arguments)
    print("| GPUs | MFU | compute, ms | reduce, MB | reduce, ms | images/s | paper's run, days | 90 epochs, days |")
    print("|---|---|---|---|---|---|---|---|")
    rates = []
    for gpus in (1, 8, 64):
        for utilization in [flags.utilization] if flags.utilization else (0.15, 0.25, 0.35):
            rate, compute, volume, reduce, paper, long = row(flags, utilization, gpus)
            print(
                f"| {gpus} | {utilization:.0%} | {compute:.1f} | {volume:.0f} | {reduce:.2f} | {rate:,.0f} "
                f"| {paper:.3f} | {long:.3f} |"
            )
            rates.append((gpus, utilization, rate))
    if flags.decoded:
        for gpus, utilization, rate in rates:
            cores = math.ceil(rate / flags.decoded)
            print(f"{gpus} GPUs at {utilization:.0%}: {cores:,} cores decode {rate:,.0f} images/s")


if __name__ == "__main__":
    run_program(main)
