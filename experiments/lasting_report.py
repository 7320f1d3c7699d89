"""Tables and pictures from the rows that docs/results/raw holds: those of `lasting.py`, and of the script before it.

``python -m experiments.lasting_report``: one line per row and seed. With ``--seeds`` one per row: medians over its
seeds, lowest and highest. A picture of some: ``--only mag-600 swa-600 --picture FILE``.
"""

import argparse
import json
import sys
from pathlib import Path

from experiments.framework import Report
from experiments.framework.picture import draw
from experiments.lasting import EXPERIMENT, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/results/raw/lasting"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, in this order")
    parser.add_argument("--seeds", action="store_true", help="one line per row: medians over its seeds")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    records = [_record(json.loads(path.read_text())) for path in sorted(options.folder.glob("*-seed*.json"))]
    if options.only:
        if missing := {*options.only} - {record["arm"] for record in records}:
            parser.error(f"--only: {options.folder} has no {', '.join(sorted(missing))}")
        records = [record for name in options.only for record in records if record["arm"] == name]
    if not options.seeds:
        records = [{**record, "arm": f"{record['arm']}, seed {record['seed']}"} for record in records]
    report = Report(EXPERIMENT, "small", tuple(records))
    print("\n".join([report.table, *report.failures]))
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(report, options.picture)
    return 0


def _record(told: dict) -> dict:
    """A unit's record; files of the script before hold a row's raw numbers themselves."""
    if "figures" in told:
        return told
    failure = {"failure": told["failure"]} if "failure" in told else {}
    return {"arm": told["name"], "seed": told.get("seed", 0), "figures": {} if failure else figures(told), **failure}


if __name__ == "__main__":
    sys.exit(main())
