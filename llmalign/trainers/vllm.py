"""Completions from a vLLM server through TRL's client, under weights that it is sent.

The server is started as TRL's client asks: `vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}'`.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedModel
from trl.generation.vllm_client import VLLMClient

from llmalign.errors import UserError

logger = logging.getLogger(__name__)

REQUESTS_AT_A_TIME = 32


class VLLMSampler:
    """A server that samples under the weights of a model of its own architecture, sent once when this is made.

    Raises UserError where vLLM is not installed or the server does not answer within `timeout` seconds. The same seed
    gives the same completions only as far as vLLM itself repeats them, which depends on how it batches. Not covered:
    adapters (merge them first), more than one process talking to the server.
    """

    def __init__(self, url: str, model: PreTrainedModel, *, timeout: float = 240.0) -> None:
        try:
            self._client = VLLMClient(base_url=url, connection_timeout=timeout)
            self._client.init_communicator(device=model.device)
        except (ImportError, ConnectionError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"the vLLM server at {url} cannot be used: {error}") from error
        self._client.update_model_params(model)
        self._client.reset_prefix_cache()
        logger.info("Sampling on the vLLM server at %s, under weights sent to it now.", url)

    def draw(
        self,
        prompt_ids: list[list[int]],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        ends: list[int],
    ) -> list[list[list[int]]]:
        """Token ids of `samples` completions of each prompt, the end token included where one was produced."""

        def ask(place: int) -> list[list[int]]:
            # A request of its own: the seed of a request is that of each of its prompts.
            answer = self._client.generate(
                [prompt_ids[place]],
                n=samples,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                logprobs=None,
                generation_kwargs={"seed": (seed + place) % 2**31, "stop_token_ids": ends},
            )
            return answer["completion_ids"]

        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            return list(pool.map(ask, range(len(prompt_ids))))

    def close(self) -> None:
        """Leave the server, so that the next round's sampler can send it other weights."""
        self._client.close_communicator()
