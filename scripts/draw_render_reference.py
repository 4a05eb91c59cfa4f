"""Draw the first frame of every task of four LIBERO suites and keep thumbnails of them: what pictures are compared with
before an evaluation. Run it only with the pinned MuJoCo; delete the file first when the pin changes on purpose. What
the file holds is kept, so a run that was cut off goes on.

    python scripts/draw_render_reference.py
"""

from itertools import zip_longest

import numpy as np
from tqdm import tqdm

from transformers_worldvla.evaluation.libero_benchmark import (
    REFERENCE_FILE,
    LiberoBenchmark,
    LiberoSpec,
    reference_name,
    thumbnail,
)
from transformers_worldvla.evaluation.libero_suites import find_tasks
from transformers_worldvla.evaluation.rendering import mujoco_warning

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def main() -> None:
    if warning := mujoco_warning():
        raise SystemExit(warning)
    thumbnails = dict(np.load(REFERENCE_FILE)) if REFERENCE_FILE.is_file() else {}
    numbers = zip_longest(*(find_tasks(suite) for suite in SUITES))
    missing = [task for tasks in numbers for task in tasks if reference_name(task.suite, task.index) not in thumbnails]
    for task in tqdm(missing):
        benchmark = LiberoBenchmark(LiberoSpec(task.suite, task.index))
        thumbnails[reference_name(task.suite, task.index)] = thumbnail(benchmark.first_frame())
        benchmark.close()
        np.savez_compressed(REFERENCE_FILE, **thumbnails)


if __name__ == "__main__":
    main()
