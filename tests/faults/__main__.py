"""Random faults: `python -m tests.faults --count 10 [--seed S] [--minutes M] [--results FILE] [--kinds K,…]`.

Each is made in a copy of the experiment as it was before an asset, and ends when that asset is there; then
everything has to be as if nothing had happened (`tests.faults.judge`). What came of it is appended to the
results, a JSON line each, so a sitting may end at any time. A seed that stands there is passed over; a
fault that was not survived is made again, and its last word holds. The table of all results is printed at the
end; `--table` prints it alone.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.assets.graphs import ROOT
from tests.faults.experiment import ORDER, SHORT
from tests.faults.judge import Judge
from tests.faults.kinds import KINDS, MOUNTING
from tests.faults.mounts import why_not
from tests.faults.site import open_lab
from tests.faults.teacher import serving
from tests.faults.trial import trial
from tests.sittings import add, commit, in_memory, latest, read

RESULTS = ROOT / "benchmarks" / "faults.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first fault; each has the next one")
    parser.add_argument("--count", type=int, default=10, help="faults of this sitting")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin none after so many")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--directory", type=Path, help="kept for the next sitting; temporary by default")
    parser.add_argument("--kinds", default="", help=f"some of: {', '.join(KINDS)}")
    parser.add_argument("--assets", default="", help="disturb the making of some alone")
    parser.add_argument("--short", action="store_true", help="in the data and one stage, in a few minutes")
    parser.add_argument("--table", action="store_true", help="print the table of the results alone")
    options = parser.parse_args()
    kinds = [each.strip() for each in options.kinds.split(",") if each.strip()] or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}")
    assets = {each.strip() for each in options.assets.split(",") if each.strip()} or set(ORDER)
    assets &= {*SHORT} if options.short else {*ORDER}
    kinds = [kind for kind in kinds if assets & {*KINDS[kind][1]}]
    if (without := {*kinds} & {*MOUNTING}) and (why := why_not()) is not None:
        print(f"LEFT OUT: {', '.join(sorted(without))}: {why}", flush=True)
        kinds = [kind for kind in kinds if kind not in without]
    if not kinds:
        parser.error(f"no kind disturbs {options.assets}")
    if options.table:
        print(table(read(options.results)))
        return 0
    if options.directory is not None:
        failed = sitting(options, kinds, assets, options.directory)
    else:
        with tempfile.TemporaryDirectory(prefix="vpmoe-faults-", dir=in_memory()) as temporary:
            failed = sitting(options, kinds, assets, Path(temporary))
    print(table(read(options.results)))
    return int(failed)


def sitting(options: argparse.Namespace, kinds: list[str], assets: set[str], directory: Path) -> bool:
    """Make faults until there are enough, or the time is over; says whether one was not survived."""
    begun, failed = time.monotonic(), False
    known = latest(read(options.results), "seed")
    with serving() as oracle, open_lab(directory, oracle, short=options.short) as lab:
        facts = lab.prepare(lambda line: print(line, flush=True))
        print(f"undisturbed: {sum(facts['seconds'].values()):.0f} s; {directory}", flush=True)
        judge = Judge(lab, facts["digests"])
        seed, made = options.seed, 0
        while made < options.count and time.monotonic() - begun < options.minutes * 60:
            if (kind := due(seed, kinds, known.get((seed,)))) is not None:
                outcome = trial(lab, judge, facts["seconds"], seed, commit(), kind, assets)
                made += 1
                failed = failed or bool(outcome.wrong)
                add(options.results, outcome.to_dict())
                verdict = "; ".join(outcome.wrong) or "as if nothing had happened"
                print(
                    f"{seed} {kind}, {outcome.asset}: {outcome.did}; made in {outcome.tries}, "
                    f"{outcome.seconds} s: {verdict}",
                    flush=True,
                )
            seed += 1
    return failed


def due(seed: int, kinds: list[str], last: dict[str, Any] | None) -> str | None:
    """Return of what kind the fault is that a seed makes; None where it stands already, and was survived."""
    if last is None:
        return kinds[seed % len(kinds)]
    return last["kind"] if last["wrong"] else None


def table(results: list[dict[str, Any]]) -> str:
    """Return results by kind; the last word about a seed holds."""
    results = [*latest(results, "seed").values()]
    by_kind = defaultdict(list)
    for result in results:
        by_kind[result["kind"]].append(result)
    lines = [f"{'kind':28}{'faults':>8}{'struck':>8}{'survived':>10}{'starts':>8}{'seconds':>9}"]
    for kind in [*sorted(by_kind), "all"]:
        found = results if kind == "all" else by_kind[kind]
        count = max(len(found), 1)
        survived = sum(not each["wrong"] for each in found)
        struck = sum(each["struck"] for each in found)
        tries, seconds = (sum(each[name] for each in found) / count for name in ("tries", "seconds"))
        lines.append(f"{kind:28}{len(found):8}{struck:8}{survived:10}{tries:8.1f}{seconds:9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
