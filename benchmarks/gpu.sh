#!/usr/bin/env bash
# Measurements for one GPU, in parts:
#
#     benchmarks/gpu.sh throughput|race|best|best-92|all [DATA_DIR] [LOGS] [extra flags of training_cifar10.py...]
#
# JAX is enough: TensorFlow need not be installed. The runs of race, best and best-92 are kept in LOGS (default
# benchmarks/results/gpu); best and best-92 resume where an earlier call was stopped. PEAK is the device's rate in bfloat16
# in TFLOP/s.
set -euo pipefail
if [ $# = 0 ]; then
    echo "usage: benchmarks/gpu.sh throughput|race|best|best-92|all [DATA_DIR] [LOGS] [FLAG...]" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
export KERAS_BACKEND="${KERAS_BACKEND:-jax}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/residual-attention-xla}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 # otherwise, each process compiles hundreds of small functions again
python="${PYTHON:-python3}"
peak="${PEAK:-790}"
part="$1"
data="${2:-}"
logs="${3:-benchmarks/results/gpu}"
extra=("${@:4}")

train() { # start a run with these flags, or resume the one that was stopped
    local folder="$logs/$1" run
    shift
    mkdir -p "$folder"
    run=$(find "$folder" -maxdepth 2 -name recipe.json -printf "%h\n" | sort | tail -1)
    if [ -n "$run" ] && [ -e "$run/result.json" ]; then
        echo "already finished: $run"
    elif [ -n "$run" ]; then
        "$python" training_cifar10.py --resume "$run"
    else
        "$python" training_cifar10.py --data-dir "$data" --logs "$folder" "$@" "${extra[@]}"
    fi
}

throughput() { "$python" -m benchmarks.throughput --peak "$peak" --name gpu-throughput ${STEPS:+--steps "$STEPS"}; }
race() { for seed in 0 1 2; do train "race-$seed" --recipe race --seed "$seed"; done; }
best() { train best-56 --recipe best; }
best_92() { train best-92 --recipe best --model attention_92 --geometry full; }

case "$part" in
    throughput) throughput ;;
    race) race ;;
    best) best ;;
    best-92) best_92 ;;
    all) throughput; race; best; best_92 ;;
    *) echo "benchmarks/gpu.sh: expected throughput, race, best, best-92 or all, received $part" >&2; exit 2 ;;
esac
[ "$part" = throughput ] || "$python" -m Training.tools.report "$logs"
