"""What test_resume starts on two ranks: every ZeRO stage unstopped and resumed, in one launch.

deepspeed --num_gpus 2 tests/engine/resume_two_ranks.py IMAGES FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.engine.test_resume import STAGES, train_and_resume

if __name__ == "__main__":
    images, folder = (Path(a) for a in sys.argv[-2:])
    for zero in STAGES:
        train_and_resume(images, folder / f"zero{zero}", zero=zero, total=25, stop=5)
