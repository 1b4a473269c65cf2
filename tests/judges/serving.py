"""A real server for the judge's tests: a tiny Llama as GGUF, served by llama.cpp in a process that can be killed.

Run as a script, it serves: `python serving.py MODEL.gguf PORT`; port 0 takes a free one, and the address is printed.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

CONTEXT = 4096
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def write_gguf(folder: Path, path: Path, *, context: int = CONTEXT) -> None:
    """Convert a Hugging Face Llama with a BPE of Llama 2's kind (spaces as ▁, bytes as <0x..>) to GGUF in float32.

    `context` is what a server will hold at most: more than the model was trained on serves as well for tests.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text())["model"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleave(tensor, heads if "q_proj" in name else groups)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        writer.add_tensor(target, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: neighbours, where transformers takes the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer, bpe: dict) -> None:
    # Pieces are joined by score, the best first: the earliest merge.
    scores = {"".join(pair): -float(rank) for rank, pair in enumerate(bpe["merges"])}
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    kinds = {"<unk>": _UNKNOWN, "<s>": _CONTROL, "</s>": _CONTROL}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, -1e6) for token in tokens])
    writer.add_token_types([_BYTE if token.startswith("<0x") else kinds.get(token, _NORMAL) for token in tokens])
    for add, name in (
        (writer.add_unk_token_id, "<unk>"),
        (writer.add_bos_token_id, "<s>"),
        (writer.add_eos_token_id, "</s>"),
    ):
        add(bpe["vocab"][name])
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


class LlamaServer:
    """llama.cpp's server in a process of its own; `kill` is SIGKILL, and another may take the same port."""

    def __init__(self, model: Path, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = ""
        while not self.url.startswith("http"):
            line = self._process.stdout.readline()
            assert line, "the server did not start"
            self.url = line.strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main(model: str, port: str) -> None:
    """Serve until killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.n_ctx, params.n_parallel = CONTEXT * 2, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # In full precision, so that log-probs can be compared with transformers'.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
