"""`llmalign merge` and `llmalign gguf`: models as other programs take them."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from llmalign.cli.common import SOMETHING_WRONG, console
from llmalign.errors import UserError

MERGE_HELP = """\
RUN is the folder of a LoRA run, a checkpoint or an adapter's folder or Hub name. Its weights are added to those of its
base (the one that it names, or --base) in float32, rounded once to --dtype and saved as an ordinary model: safetensors,
tokenizer, generation config. The logits are compared before and after. LoRA weights of an image run are merged into
their pipeline. An adapter that was trained beside a 4- or 8-bit base is merged into the full weights, and that is said.

  llmalign merge runs/rpo-lora --out merged
  llmalign merge runs/rpo-lora/checkpoint-100 --base ./mistral --out merged --dtype bfloat16
"""
GGUF_HELP = """\
RUN is a run's folder, a checkpoint, a Hub name, embedded:tiny, or an adapter, which is merged first. Models of Llama's
shape (Llama, Mistral, Qwen2, Qwen3) with a BPE tokenizer can be written. --dtype is that of the matrices: f32, f16,
bf16 or q8_0. --check loads the file in llama.cpp (pip install xllamacpp) and compares it with transformers: how texts
are split, the log-probs of a first token, and the greedy continuation; exit status 1 where it does not fit.

  llmalign gguf runs/rpo --out model.gguf --check
  llmalign gguf runs/rpo-lora --out model.gguf --dtype q8_0
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parsers to the command line's grammar; `layout` holds what all parsers share."""
    merge = commands.add_parser("merge", help="an adapter into the weights", description=MERGE_HELP, **layout)
    _add_source(merge)
    merge.add_argument("--out", required=True, metavar="DIR", help="where to write")
    merge.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    merge.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (that of the base)")
    merge.set_defaults(run=_merge)
    gguf = commands.add_parser("gguf", help="a model as a file for llama.cpp", description=GGUF_HELP, **layout)
    _add_source(gguf)
    gguf.add_argument("--out", required=True, metavar="FILE", help="where to write; a file that is there is replaced")
    gguf.add_argument("--dtype", default="f16", metavar="DTYPE", help="f32, f16, bf16 or q8_0 (f16)")
    gguf.add_argument("--context", type=int, metavar="N", help="tokens of context (what the model was made for)")
    gguf.add_argument("--chat_template", metavar="FILE", help="a Jinja file in place of the tokenizer's own")
    gguf.add_argument("--check", action="store_true", help="load it in llama.cpp and compare")
    gguf.set_defaults(run=_gguf)


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="RUN")
    command.add_argument("--base", metavar="MODEL", help="what an adapter is put on (what it names)")
    command.add_argument("--revision", metavar="NAME", help="of a Hub name")
    command.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def _merge(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse("merge", rest)
    folder = Path(options.model).expanduser()
    if any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors")):
        return _merge_images(options)
    from llmalign.export.merge import merge_adapter

    merged = merge_adapter(
        options.model, options.out, base=options.base, revision=options.revision, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code, overwrite=options.overwrite,
    )  # fmt: skip
    _say(
        f"{options.model} on {merged.base}, merged in {shlex.quote(str(merged.path))} ({merged.dtype}); its logits are "
        f"those of the adapter beside its base to {merged.gap:.1e} in float32."
    )
    return 0


def _merge_images(options: argparse.Namespace) -> int:
    from llmalign.export.files import folder_aside, require_room

    out = Path(options.out).expanduser()
    require_room(out, overwrite=options.overwrite, sources=(options.model, options.base))
    from llmalign.diffusion.merging import merge_image_adapter
    from llmalign.diffusion.sampling import starting_point

    require_room(out, overwrite=options.overwrite, sources=(starting_point(options.model, options.base),))
    with folder_aside(out, overwrite=options.overwrite) as aside:
        start = merge_image_adapter(options.model, aside, base=options.base, dtype=options.dtype)
    _say(f"{options.model} on {start}, merged in {shlex.quote(str(out))}; `llmalign sample` draws with it.")
    return 0


def _gguf(options: argparse.Namespace, rest: list[str]) -> int:
    _refuse("gguf", rest)
    if options.context is not None and options.context < 1:
        raise UserError(f"--context is a number of tokens, not {options.context}.")
    export_gguf = _exporter(options.dtype)
    if options.check:
        from llmalign.export.llama_cpp import require_llama_cpp

        require_llama_cpp()
    from llmalign.export.files import require_file
    from llmalign.export.merge import load_whole
    from llmalign.inference import model_name

    require_file(Path(options.out).expanduser())
    template = _template(options.chat_template)
    model, tokenizer = load_whole(
        options.model, base=options.base, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    written = export_gguf(
        model, tokenizer, options.out, dtype=options.dtype, context=options.context, chat_template=template,
        name=model_name(options.model),
    )  # fmt: skip
    size = f"{written.bytes / 1e6:.1f} MB"
    _say(f"{options.model} in {shlex.quote(str(written.path))}: {written.architecture}, {options.dtype}, {size}.")
    return _check(written.path, model, tokenizer, options.dtype) if options.check else 0


def _exporter(dtype: str) -> Any:
    """What writes the file, which knows the dtype."""
    try:
        from llmalign.export.gguf import export_gguf, require_kind
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError("writing GGUF needs the gguf package: pip install 'llmalign[gguf]'") from error
    require_kind(dtype)
    return export_gguf


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {file} cannot be read as UTF-8 text: {error}.") from error


def _check(path: Path, model: Any, tokenizer: Any, dtype: str) -> int:
    from llmalign.export.llama_cpp import check_gguf

    found = check_gguf(path, model, tokenizer, dtype=dtype)
    fits = "as in transformers" if found.passed else "NOT as in transformers"
    _say(
        f"llama.cpp: {fits}. First token: log-probs to {found.gap:.1e} nats (at most {found.tolerance:g}); greedy: "
        f"{found.agreeing} of {found.new_tokens} tokens alike; {found.texts - len(found.split_otherwise)} of "
        f"{found.texts} texts split alike."
    )
    for text in found.split_otherwise:
        _say(f"split otherwise: {text!r}")
    return 0 if found.passed else SOMETHING_WRONG


def _refuse(command: str, rest: list[str]) -> None:
    if rest:
        raise UserError(f"{command} does not know {' '.join(rest)}.")


def _say(text: str) -> None:
    console().print(text, highlight=False, soft_wrap=True, markup=False)
