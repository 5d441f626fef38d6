#!/usr/bin/env bash
# Compares the benchmarks of a revision with those of the working tree.
#
#   bench/benchcmp.sh REV
#
# Builds the test binaries of both, runs them in turn, so that a change of the
# machine's mood falls on both alike, and lets benchstat judge the difference.
#
#   COUNT      runs of each (10; benchstat wants at least 6)
#   BENCH      which benchmarks, a regular expression as for go test -bench (.)
#   BENCHTIME  duration of each (100ms)
#   PKGS       packages that hold the benchmarks (". ./bench ./internal/ring")
#   OUT        directory to keep the raw figures in (none)
set -euo pipefail

if [[ $# -ne 1 || $1 == -* ]]; then
	echo "usage: [COUNT=10] [BENCH=regexp] [BENCHTIME=100ms] [OUT=dir] $0 REV" >&2
	exit 2
fi
count=${COUNT:-10} bench=${BENCH:-.} benchtime=${BENCHTIME:-100ms}
read -ra pkgs <<<"${PKGS:-. ./bench ./internal/ring}"

cd "$(dirname "$0")/.."
head=$PWD
rev=$(git rev-parse --verify --quiet "$1^{commit}") || {
	echo "$0: no revision $1" >&2
	exit 2
}
tmp=$(mktemp -d)
cleanup() {
	git worktree remove --force "$tmp/tree" 2>/dev/null || true
	git worktree prune
	rm -rf "$tmp"
}
trap cleanup EXIT
git worktree add --quiet --detach "$tmp/tree" "$rev"

# build DIR SIDE: the test binaries of the packages in DIR. A package that the
# revision does not have yet is left out and shows up in one column only.
build() {
	local i
	for i in "${!pkgs[@]}"; do
		[[ -d $1/${pkgs[i]} ]] || continue
		(cd "$1" && go test -c -o "$tmp/$2.$i.test" "${pkgs[i]}")
	done
}
build "$tmp/tree" base
build "$head" head

# run SIDE DIR: every binary once, in its package's directory, as go test does.
run() {
	local i
	for i in "${!pkgs[@]}"; do
		[[ -x $tmp/$1.$i.test ]] || continue
		(cd "$2/${pkgs[i]}" && "$tmp/$1.$i.test" -test.run='^$' -test.bench="$bench" \
			-test.benchtime="$benchtime" -test.timeout=30m) >>"$tmp/$1.txt"
	done
}
touch "$tmp/base.txt" "$tmp/head.txt"
for ((i = 1; i <= count; i++)); do
	echo "round $i of $count" >&2
	# Whoever goes second finds a warmer machine: take turns.
	if ((i % 2)); then
		run base "$tmp/tree"
		run head "$head"
	else
		run head "$head"
		run base "$tmp/tree"
	fi
done

if [[ -n ${OUT:-} ]]; then
	mkdir -p "$OUT"
	cp "$tmp/base.txt" "$tmp/head.txt" "$OUT/"
fi
cd "$head"
go tool benchstat "base=$tmp/base.txt" "head=$tmp/head.txt"
