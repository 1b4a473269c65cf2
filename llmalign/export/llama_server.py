"""llama.cpp's server as a process of its own: `python -m llmalign.export.llama_server MODEL.gguf` prints its address.

It imports nothing else, so that it starts at once, and ends with its standard input.
"""

import sys

import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]

CONTEXT = 512


def main(model: str) -> None:
    """Serve on the loopback until stdin is closed, one text at a time, everything but the weights in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx, params.n_parallel = CONTEXT, 1
    # In full precision, so that log-probs can be compared.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
