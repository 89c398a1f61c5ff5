"""The tables of model families in docs/families.md, from the tests' measurements: ``python -m bench.studies.families``.

``pytest tests/adapters/test_families.py --family-results=FILE.json`` writes one of its source files. They are in
``bench/results/families``, one for every version of transformers that the table names.

The second table has a line for every causal language model of the installed transformers. The reasons in it are those
of ``depass_fast/adapters/unsupported.py``. The third has the errors that the files of families raise for a
configuration or a prompt.
"""

from __future__ import annotations

import ast
import itertools
import json
import re

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from depass_fast.adapters import family_file, supported_families
from depass_fast.adapters.unsupported import REASONS
from tests.support.family_models import VARIANTS

from ..core.markdown import table
from ..core.results import ROOT

FILES = ROOT / "depass_fast" / "adapters" / "families"
PAGE = ROOT / "docs" / "families.md"
RESULTS = ROOT / "bench" / "results" / "families"
BEGIN, END = "<!-- table: families (python -m bench.studies.families) -->", "<!-- end of table -->"
BEGIN_TYPES = "<!-- table: all types (python -m bench.studies.families) -->"
BEGIN_REFUSED = "<!-- table: refused configurations (python -m bench.studies.families) -->"

# the usual names of the models of a `model_type`; the rows of the table have this order
KNOWN = {
    "gpt2": "GPT-2, GPT-SW3",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gptj": "GPT-J",
    "gpt_bigcode": "StarCoder 1, SantaCoder",
    "opt": "OPT, Galactica",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "falcon": "Falcon 7B to 180B, Falcon-RW",
    "llama": "Llama 1 to 3, SmolLM 1 and 2",
    "mistral": "Mistral, Mistral Nemo",
    "ministral": "Ministral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 1.5 to 2.5",
    "qwen2_moe": "Qwen 1.5 and 2 MoE",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3 MoE",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 1B",
    "gemma3": "Gemma 3 4B and up",
    "gemma3n_text": "Gemma 3n (E2B, E4B; text, also of `gemma3n`)",
    "gemma4": "Gemma 4 (E2B, E4B, 26B, 31B)",
    "gemma4_text": "Gemma 4 (text)",
    "gemma4_unified": "Gemma 4 Unified",
    "gemma4_unified_text": "Gemma 4 Unified (text)",
    "phi": "Phi-1, 1.5, 2",
    "phi3": "Phi-3, 3.5, Phi-4, Phi-4-mini",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A",
    "stablelm": "StableLM 2, StableLM 3B",
    "starcoder2": "StarCoder 2",
    "smollm3": "SmolLM 3",
    "nemotron": "Nemotron 4, Minitron",
    "glm": "GLM-4",
    "glm4": "GLM-4-0414",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS",
    "helium": "Helium",
    "hunyuan_v1_dense": "HunYuan (dense)",
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "olmoe": "OLMoE",
    "flex_olmo": "FlexOlmo",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "GLM-4.5 to 4.7",
    "dots1": "dots.llm1",
    "granitemoe": "Granite 3 MoE, PowerMoE",
    "granitemoeshared": "Granite MoE with a shared expert",
    "phimoe": "Phi-3.5-MoE, Phi-mini-MoE",
    "ernie4_5_moe": "ERNIE 4.5 MoE",
    "hunyuan_v1_moe": "HunYuan A13B",
    "minimax_m2": "MiniMax M2",
    "exaone_moe": "K-EXAONE",
    "solar_open": "Solar Open",
    "cohere2_moe": "Command A MoE",
    "hy_v3": "HunYuan 3",
    "kolibri1": "Kolibri 1",
    "mellum": "Mellum 2",
    "deepseek_v2": "DeepSeek V2, V2-Lite",
    "deepseek_v3": "DeepSeek V3, R1, Kimi K2, Moonlight",
    "deepseek_v32": "DeepSeek V3.2",
    "glm_moe_dsa": "GLM-5",
    "deepseek_v4": "DeepSeek V4",
    "hy_v4": "Hunyuan 4",
    "qwen4_exp": "Qwen 4 (experimental)",
    "qwen4_exp_text": "Qwen 4 (experimental, text)",
    "longcat_flash": "LongCat Flash",
    "minimax_m3_vl_text": "MiniMax M3 (text)",
    "dots3_note_text": "dots 3",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "youtu": "Youtu",
    "minicpm3": "MiniCPM 3",
    "gpt_neo": "GPT-Neo, TinyStories",
    "codegen": "CodeGen 1, 2",
    "ministral3": "Ministral 3 (its text model)",
    "cwm": "CWM",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "vaultgemma": "VaultGemma",
    "persimmon": "Persimmon",
    "nanochat": "NanoChat",
    "xglm": "XGLM",
    "biogpt": "BioGPT",
    "jais2": "Jais 2",
    "openai-gpt": "GPT-1",
    "ctrl": "CTRL",
    "internlm3": "InternLM 3",
    "iquestcoder": "IQuest-Coder",
    "hyperclovax": "HyperCLOVA X",
    "gpt_neox_japanese": "GPT-NeoX Japanese",
    "granite_swa": "Granite with windows",
    "granitemoehybrid": "Granite 4",
    "laguna": "Laguna",
    "beam": "Beam",
    "bailing_hybrid": "Ling 2.5 (Bailing hybrid)",
    "bitnet": "BitNet b1.58 (master weights)",
    "falcon_h1": "Falcon-H1",
    "minimax": "MiniMax Text 01, M1",
    "llama4": "Llama 4",
    "llama4_text": "Llama 4 (text)",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5": "Qwen 3.5, 3.6",
    "qwen3_5_moe": "Qwen 3.5, 3.6 MoE",
    "qwen3_5_text": "Qwen 3.5, 3.6 (text)",
    "qwen3_5_moe_text": "Qwen 3.5, 3.6 MoE (text)",
    "afmoe": "AFM (Arcee Trinity)",
    "olmo_hybrid": "OLMo Hybrid",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 MoE",
    "lfm3": "LFM3",
    "mamba": "Mamba",
    "falcon_mamba": "Falcon Mamba",
    "mamba2": "Mamba-2",
    "jamba": "Jamba",
    "recurrent_gemma": "RecurrentGemma, Griffin",
    "xlstm": "xLSTM 7B",
    "rwkv": "RWKV-4",
    "diffllama": "DiffLlama",
    "doge": "Doge",
    "zaya": "ZAYA 1",
    "zamba": "Zamba",
    "zamba2": "Zamba 2",
    "jetmoe": "JetMoE",
    "inkling_text": "Inkling (text)",
    "bamba": "Bamba",
    "nemotron_h": "Nemotron-H",
    "kimi_linear": "Kimi Linear",
    "granitemoe_swa": "Granite MoE with windows",
    "cohere_compass_text": "Cohere Compass, North Micro Vision (its text model)",
    "aria_text": "Aria (its text model)",
    "axk1": "A.X K1",
    "axk2": "A.X K2",
    "mimo_v2_flash": "MiMo V2 Flash",
    "flint": "Flint",
    "emu3": "Emu 3",
    "mllama": "Llama 3.2 Vision (text)",
    "fuyu": "Fuyu",
    "got_ocr2": "GOT-OCR 2",
    "moss_transcribe_diarize": "MOSS Transcribe Diarize",
    "phi4_multimodal": "Phi-4 multimodal",
    "dbrx": "DBRX",
    "git": "GIT",
    "moshi": "Moshi, Helium (its text model)",
    "modernbert-decoder": "ModernBERT decoder, Ettin",
}


def families_table(results: list[dict]) -> str:
    """The table in Markdown, from result files in ascending order of their versions of transformers."""
    kinds = sorted(
        {kind for result in results for measured in result["variants"].values() for kind in measured["kinds"]}
    )
    rows = []
    for model_type, known in KNOWN.items():
        names = [name for name, (family, _) in VARIANTS.items() if family == model_type]
        measured = [result["variants"][name] for result in results for name in names if name in result["variants"]]
        tested = {kind for one in measured for kind in one["kinds"]}
        errors = (
            max((one[f"completeness {dtype}"] for one in measured if f"completeness {dtype}" in one), default=None)
            for dtype in _DTYPES
        )
        versions = [result["transformers"] for result in results if any(name in result["variants"] for name in names)]
        rows.append(
            [
                f"{known} (`{model_type}`)",
                "; ".join(name.partition(": ")[2] for name in names if ": " in name) or "-",
                "all" if tested == set(kinds) else ", ".join(sorted(tested)),
                *("-" if error is None else f"{error:.0e}" for error in errors),
                ", ".join(versions),
            ]
        )
    header = ["models (`model_type`)", "beside the plain one, tested", "kinds", "fp32", "fp64", "transformers"]
    note = f"Kinds of components: {', '.join(kinds)}. fp32, fp64: the worst completeness error (1e-5, 1e-12 allowed)."
    narrow = ", ".join(f"`{model_type}`" for model_type in NARROW_INSIDE)
    note += (
        f" A part of {narrow} is computed in float32 by the model itself, whatever its dtype: there 1e-6 is allowed."
    )
    note += " Where heads can share keys and values, every row with and without."
    return f"{table(header, rows)}\n\n{note}"


_DTYPES = ("float32", "float64")
NARROW_INSIDE = ("beam", "hy_v4")  # families that compute some of it in float32, whatever the model computes in


def committed() -> list[dict]:
    """The committed result files, in ascending order of their versions."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return sorted(results, key=lambda result: [int(part) for part in result["transformers"].split(".")])


def file_of(model_type: str) -> str | None:
    """The file that supports a type of transformers' list; some types have another family's config (GPT-SW3)."""
    return family_file(model_type) or family_file(CONFIG_MAPPING[model_type].model_type)


def unexplained() -> list[str]:
    """The types of the installed transformers that have neither support nor a reason."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if file_of(name) is None and name not in REASONS]


def types_table() -> str:
    """The table of all causal language models of the installed transformers, in Markdown."""
    rows = []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        file = file_of(name)
        runs = "-" if file is None else f"[`{file}`](../depass_fast/adapters/families/{file}.py)"
        rows.append([f"`{name}`", runs, REASONS[name] if file is None else "-"])
    running = sum(row[1] != "-" for row in rows)
    return f"{running} of {len(rows)} types run.\n\n{table(['`model_type`', 'runs, by the family', 'why not'], rows)}"


def refused_table() -> str:
    """The table of what the files of supported families refuse, in Markdown, from the errors in their code."""
    files = {path.stem: ast.parse(path.read_text()) for path in sorted(FILES.glob("*.py"))}
    of_file = {name: [one for one in supported_families() if family_file(one) == name] for name in files}
    rows = []
    for name, tree in files.items():
        declared = [of_file[other] for other in files if name in _declared_by(other, files)]
        types = ", ".join(f"`{one}`" for one in sorted(itertools.chain(*declared)))
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        rows += [[types, _said(call.args[0])] for call in raised if isinstance(call, ast.Call)]
    return table(["`model_type`", "what the error says"], rows)


def _declared_by(name: str, files: dict[str, ast.Module]) -> set[str]:
    """The files that declare the families of a file: itself, and those that it imports."""
    found = [node for node in files[name].body if isinstance(node, ast.ImportFrom) and node.level == 1]
    others = (alias.name for node in found if node.module is None for alias in node.names)
    return {name}.union(*(_declared_by(other, files) for other in others if other in files))


def _said(message: ast.expr) -> str:
    """The text of an error, with dots for what it names of a configuration."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    texts = (str(one.value) if isinstance(one, ast.Constant) else "…" for one in parts)
    return "".join(texts).removeprefix("model: ")


def with_table(page: str, results: list[dict]) -> str:
    """Return the page with the table of families between its marks."""
    return _between(BEGIN, families_table(results), page)


def with_types(page: str) -> str:
    """Return the page with the table of all types between its marks."""
    return _between(BEGIN_TYPES, types_table(), page)


def with_refused(page: str) -> str:
    """Return the page with the table of refused configurations between its marks."""
    return _between(BEGIN_REFUSED, refused_table(), page)


def _between(begin: str, text: str, page: str) -> str:
    pattern = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(END)})", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"docs/families.md has no {begin} ... {END}.")
    return pattern.sub(lambda _: f"\n{text}\n\n", page)


def main() -> None:
    PAGE.write_text(with_refused(with_types(with_table(PAGE.read_text(), committed()))))


if __name__ == "__main__":
    main()
