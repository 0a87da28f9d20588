#!/usr/bin/env bash
# Draws the curves that `lethe-bench growth` wrote to target/bench/curves into docs/develop/performance/*.png. Curves that were
# not measured are left out, and said so. Needs gnuplot (Debian: gnuplot-nox).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

CURVES=${1:-target/bench/curves}
IMAGES=${2:-docs/develop/performance}

command -v gnuplot >/dev/null || {
    echo "plot.sh: gnuplot is not installed; install it (Debian: apt-get install gnuplot-nox) and run $0 again" >&2
    exit 1
}
mkdir -p "$IMAGES"

# draw NAME CURVE: draws what the script on stdin plots; CURVE has to be there.
draw() {
    local name=$1 data=$CURVES/$2.tsv
    if [[ ! -s $data ]]; then
        echo "plot.sh: $name is left out: $data was not measured"
        return
    fi
    {
        cat <<GNUPLOT
set terminal pngcairo size 900,540 font "sans,11"
set output "$IMAGES/$name.png"
set datafile separator tab
set grid
set key top left
set style data linespoints
data = "$data"
GNUPLOT
        cat
    } | gnuplot
    echo "$IMAGES/$name.png"
}

draw cost-by-identities identities <<'GNUPLOT'
set title "Cost of a request by the number of identities"
set logscale x
set xlabel "identities"
set ylabel "µs a request"
set yrange [0:*]
plot data using "identities":"intake_us" title "intake" pointtype 7, \
     data using "identities":"raw_intake_us" title "intake, raw" dashtype 2 pointtype 6, \
     data using "identities":"erasure_us" title "erasure" pointtype 5, \
     data using "identities":"raw_erasure_us" title "erasure, raw" dashtype 2 pointtype 4
GNUPLOT

draw ratio-by-identities identities <<'GNUPLOT'
set title "Lethe against raw by the number of identities"
set logscale x
set xlabel "identities"
set ylabel "ratio"
set yrange [0:*]
plot data using "identities":"intake_ratio" title "intake" pointtype 7, \
     data using "identities":"erasure_ratio" title "erasure" pointtype 5
GNUPLOT

draw erasure-by-event-batches event-batches <<'GNUPLOT'
set title "Erasure of a request by its event batches"
set logscale xy
set xlabel "event batches a profile"
set ylabel "µs a request"
plot data using "event_batches":"request_us" title "Lethe" pointtype 7, \
     data using "event_batches":"raw_request_us" title "raw" dashtype 2 pointtype 6
GNUPLOT

draw throughput-by-workers workers <<'GNUPLOT'
set title "Throughput by workers of a kind"
set xlabel "workers"
set ylabel "per second"
set logscale y
set yrange [1000:1000000]
set xtics (1, 2, 4)
plot data using "workers":"intake_a_second" title "intake, requests" pointtype 7, \
     data using "workers":"erased_rows_a_second" title "erasure, rows" pointtype 5, \
     data using "workers":"callbacks_a_second" title "callbacks, deliveries" pointtype 9
GNUPLOT

draw_memory() {
    draw "memory-$1" "memory-$1" <<GNUPLOT
set title "Peak memory of $2"
set logscale x
set xlabel "$3"
set ylabel "MiB"
set yrange [0:*]
plot data using 1:2 notitle pointtype 7
GNUPLOT
}
draw_memory matcher "an identity-matcher" "requests in its queue"
draw_memory scheduler "a scheduler" "requests of the batch it releases"
draw_memory executor "an erasure-executor" "requests of the batch it erases"
draw_memory courier "a callback-courier" "callbacks that are due"
draw_memory compiler "an access-compiler" "MB of the result it compiles"
