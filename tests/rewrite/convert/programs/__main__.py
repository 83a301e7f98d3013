"""``python -m tests.rewrite.convert.programs --count 5000 --seed 0``: failures, made smaller."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import time

from .judge import judge, shrink
from .source import random_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--show", type=int, default=10, help="at most so many failures")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after that")
    parser.add_argument("--only", default="", help="programs whose text has this")
    args = parser.parse_args()
    faulthandler.enable()
    kinds: collections.Counter[str] = collections.Counter()
    start, done = time.monotonic(), 0
    for seed in range(args.seed, args.seed + args.count):
        program = random_program(seed)
        if args.only not in str(program):
            continue
        if time.monotonic() - start > args.seconds or sum(kinds.values()) >= args.show:
            break
        done += 1
        why = judge(program)
        if why is None:
            continue
        small = shrink(program, lambda p: judge(p) is not None)
        found = judge(small) or why
        kinds[found.split(":")[0]] += 1
        print(f"\n#### {found}\n{small}", flush=True)
    print(f"{done} programs from seed {args.seed}, {sum(kinds.values())} differ")


if __name__ == "__main__":
    main()
