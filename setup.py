"""Build hook: recipes, data specs, samples and launch configurations ship inside the package as `llmalign/_assets`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSET_FOLDERS = ("trainers", "data", "accelerate_configs")
ASSET_SUFFIXES = {".yaml", ".md", ".jsonl", ".parquet"}
ROOT = Path(__file__).resolve().parent


class BuildWithAssets(build_py):
    """`build_py` that also copies the top-level asset folders; an editable install reads them in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target_root = Path(self.build_lib) / "llmalign" / "_assets"
        shutil.rmtree(target_root, ignore_errors=True)
        for folder in ASSET_FOLDERS:
            for source in sorted((ROOT / folder).rglob("*")):
                if source.is_file() and source.suffix in ASSET_SUFFIXES:
                    target = target_root / source.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithAssets})
