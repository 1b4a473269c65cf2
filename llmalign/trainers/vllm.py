"""Completions from a vLLM server (`trl vllm-serve`) through TRL's client, under weights that it is sent."""

import logging
from typing import Any

from transformers import PreTrainedModel
from trl.generation.vllm_client import VLLMClient

from llmalign.errors import UserError

logger = logging.getLogger(__name__)


class VLLMSampler:
    """A server that samples under the weights of a model of its own architecture, sent once when this is made.

    Raises UserError where vLLM is not installed or the server does not answer within `timeout` seconds. The same seed
    gives the same completions only as far as vLLM itself repeats them, which depends on how it batches. Not covered:
    adapters (merge them first), more than one process talking to the server.
    """

    def __init__(self, url: str, model: PreTrainedModel, *, timeout: float = 240.0) -> None:
        try:
            self._client = VLLMClient(base_url=url, connection_timeout=timeout)
        except (ImportError, ConnectionError) as error:
            raise UserError(f"no vLLM server can be used at {url}: {error}") from error
        self._client.init_communicator(device=model.device)
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
        options: dict[str, Any] = {"seed": seed, "stop_token_ids": ends}
        answer = self._client.generate(
            prompt_ids,
            n=samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            logprobs=None,
            generation_kwargs=options,
        )
        drawn = answer["completion_ids"]
        return [drawn[first : first + samples] for first in range(0, len(drawn), samples)]

    def close(self) -> None:
        """Leave the server, so that the next round's sampler can send it other weights."""
        self._client.close_communicator()
