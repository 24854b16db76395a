"""Vocabulary, counts and loss weights of a million pictures with thirty tags each; all are proportional to the number.

    python benchmarks/bench_tags.py --pictures 6000000        the report's scale: some minutes

Synthetic (`synthetic_manifest`); the column is made before the clock starts. The peer is Arrow's own plain count of the
same column (`value_counts` of all tags), which knows no categories and no weights. Peak memory is the process's.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).parent))

from measurement import record
from synthetic_tags import synthetic_categories, synthetic_tags, vocabulary

from sumizome.data.tag_codes import code_tags
from sumizome.data.tags import TagWeightConfig, tag_counts, tag_loss_weights, weigh


def _peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pictures", type=int, default=1_000_000)
    count = arguments.parse_args().pictures
    words = vocabulary(200_000)
    tags = synthetic_tags(count, 30.0, words)
    repeats = np.ones(count, np.int32)
    table = pa.table({"tags": tags, "repeats": repeats})
    categories, config = synthetic_categories(words), TagWeightConfig(strength=0.5)
    column = _peak()
    record("tags: pictures", count, "pictures", better="higher")
    record("tags: memory of the column before", column, "MB", better="lower")

    peer = _seconds(lambda: pc.value_counts(pc.list_flatten(table["tags"])))
    plain = "pyarrow value_counts of all tags"
    for name, work in (
        ("tags: code a column", lambda: code_tags(table["tags"])),
        ("tags: count", lambda: tag_counts(table)),
        ("tags: loss weight of every picture", lambda: tag_loss_weights(table, config, categories)),
        (
            "tags: weights and statistics",
            lambda: weigh(code_tags(table["tags"]), table["repeats"].to_numpy(), config, categories),
        ),
    ):
        record(name, _seconds(work), "s", better="lower", peer=plain, peer_value=peer)
        record(f"{name}: peak beyond the column", _peak() - column, "MB", better="lower")


def _seconds(work: object) -> float:
    """Processor time: other processes of the machine do not count."""
    assert callable(work)
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
