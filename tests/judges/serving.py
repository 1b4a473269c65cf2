"""A real server for the judge's tests: a tiny Llama as GGUF, served by llama.cpp in a process that can be killed.

Run as a script, it serves: `python serving.py MODEL.gguf PORT`; port 0 takes a free one, and the address is printed.
"""

import signal
import subprocess
import sys
from pathlib import Path

CONTEXT = 4096
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_gguf(folder: Path, path: Path, *, context: int = CONTEXT) -> None:
    """Write the model in `folder` as GGUF in float32, with the chat template of these tests.

    `context` is what a server will hold at most: more than the model was trained on serves as well for tests.
    """
    from llmalign.export.gguf import export_gguf
    from llmalign.inference import load_for_inference

    model, tokenizer = load_for_inference(str(folder), dtype="float32", device="cpu")
    export_gguf(model, tokenizer, path, dtype="f32", context=context, chat_template=CHAT_TEMPLATE)


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
