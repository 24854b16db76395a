"""Run the studies, all or those named, and write their pages.

    python -m studies [NAME …] [--processes 2] [--pages]

Results that are there already are not made again. `--pages` runs nothing and writes the pages anew from docs/studies.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: each process has one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from studies.all_studies import STUDIES
from studies.harness import collect, read_results, run_studies
from studies.pages import write_index, write_page


def main() -> None:
    """The command line."""
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names, []], help=f"of {' '.join(names)}; by default all")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, a thread each (default: 1)")
    parser.add_argument("--pages", action="store_true", help="write the pages from docs/studies and run nothing")
    options = parser.parse_args()
    chosen = [study for study in STUDIES if not options.names or study.name in options.names]
    if options.pages:
        for study in chosen:
            write_page(study, read_results(study.name))
    else:
        for study in run_studies(chosen, options.processes):
            write_page(study, collect(study))
    write_index(STUDIES)


if __name__ == "__main__":
    main()
