"""Adapter for lm-evaluation-harness: a model of this package as one of its models.

https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md is the contract.
Needs neither PyTorch nor transformers.
"""

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import keras
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.scoring.continuations import encode_pair
from keras_gemma.scoring.token_tree import token_tree
from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.version import __version__

BATCH_SIZE = 16
"""Texts that are generated together, unless lm-eval's `batch_size` is a number."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Maximum number of new tokens of a task that sets none."""

MODEL_TURN = "<start_of_turn>model"
"""Beginning of the turn that the model writes."""

Pair = tuple[np.ndarray, np.ndarray]
"""Ids of a context and of its continuation, int32."""


class KerasGemmaLM(TemplateLM):
    """A Gemma model for lm-evaluation-harness.

    Every text begins with one `<bos>`, also after truncation: without it, Gemma's scores collapse.
    Texts that exceed the context lose tokens after `<bos>`, as in lm-eval's own models, and are
    listed in `truncated`.

    Args:
        pretrained: A `GemmaCausalLM`, or what `GemmaCausalLM.from_preset` accepts.
        dtype: Same as in `from_preset`.
        quantization: Same as in `from_preset`.
        lora: Folder of an adapter.
        batch_size: Number of texts that are generated together. `"auto"` is 16. Likelihoods are
            read in chunks of constant size, whatever the batch size.
        report: Called with the number of tokens after each chunk of tokens and each batch.
        device: Ignored: Keras places the model.
        max_batch_size: Ignored.

    Example:

    ```python
    import lm_eval

    import keras_gemma
    from keras_gemma.evaluation.harness import KerasGemmaLM

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    # Downloads the task's data:
    # lm_eval.simple_evaluate(KerasGemmaLM(lm), tasks=["arc_easy"], limit=100)
    ```
    """

    def __init__(
        self,
        pretrained: GemmaCausalLM | str,
        dtype: str | None = None,
        quantization: str | None = None,
        lora: str | None = None,
        batch_size: int | str = "auto",
        report: Callable[[int], None] | None = None,
        device: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            options = {"dtype": dtype, "quantization": quantization}
            options = {name: value for name, value in options.items() if value is not None}
            pretrained = GemmaCausalLM.from_preset(pretrained, **options)
            if lora is not None:
                pretrained.load_lora(lora)
        self.lm = pretrained
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else BATCH_SIZE
        self.report = report or (lambda tokens: None)
        self.truncated: list[tuple[str, int]] = []
        """Task and document of each item that was longer than the context."""
        self._templates: dict[str, np.ndarray] = {}  # ids of the texts of `apply_chat_template`
        self._counted: dict[tuple[str, str], Pair] = {}  # ids by the arguments of requests
        self._last: tuple[str, list[int]] = "", []  # the last context and its ids

    @property
    def max_length(self) -> int:
        """Context length, in tokens."""
        return self.lm.backbone.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self.lm.preprocessor.tokenizer.end_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.lm.preprocessor.tokenizer.start_token_id

    # Text to ids

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, which begin with `<bos>` unless `add_special_tokens=False`.

        Names of control tokens, such as `<start_of_turn>`, are plain text, unless
        `apply_chat_template` of this object has written them.
        """
        if add_special_tokens is False:
            return self._plain(string)
        turn = string.rfind(MODEL_TURN) if self._templates else -1
        while turn >= 0:
            end = turn + len(MODEL_TURN)
            if (ids := self._templates.get(string[:end])) is not None:
                # The template ends with a newline, which `encode_pair` moves to the continuation.
                whole = string.startswith("\n", end)
                return ids[: len(ids) - (not whole)].tolist() + self._plain(string[end + whole :])
            turn = string.rfind(MODEL_TURN, 0, turn)
        tokenizer = self.lm.preprocessor.tokenizer
        return [tokenizer.start_token_id, *self._plain(string.removeprefix(tokenizer.start_token))]

    def _plain(self, string: str) -> list[int]:
        return self.lm.preprocessor.tokenizer.encode([string], parse_special=False)[0]

    def _pair(self, request: Instance) -> tuple[list[int], list[int]]:
        """Returns the ids of the context and of the continuation of a request."""
        context, continuation = request.args
        if context == "":
            return [self.prefix_token_id], self._plain(continuation)
        if self._last[0] != context.rstrip():
            self._last = context.rstrip(), self.tok_encode(context.rstrip())
        last, ids = self._last
        return encode_pair(
            lambda text: ids if text == last else self.tok_encode(text), context, continuation
        )

    def _fit(self, ids: list[int], length: int, request: Instance) -> list[int]:
        """Returns the ids without those after `<bos>` that exceed `length`."""
        if len(ids) <= length:
            return ids
        self.truncated.append((request.task_name or "", request.doc_id or 0))
        return [ids[0], *ids[len(ids) - length + 1 :]]

    def _likelihood_pairs(self, requests: Iterable[Instance]) -> list[Pair]:
        """Returns the ids of requests, which `count_tokens` may have encoded before."""
        return [self._counted.pop(one.args, None) or self._likelihood_pair(one) for one in requests]

    def _likelihood_pair(self, request: Instance) -> Pair:
        context, continuation = self._pair(request)
        if not continuation:
            raise ValueError(
                f"Item {request.doc_id} of {request.task_name} has a choice without tokens. "
                f"Received: {request.args[1]!r}"
            )
        ids = self._fit(context + continuation, self.max_length + 1, request)
        cut = len(ids) - min(len(continuation), len(ids) - 1)
        return np.array(ids[:cut], "int32"), np.array(ids[cut:], "int32")

    def _windows(self, text: str) -> list[Pair]:
        """Returns the windows of a text of any length: each token is scored once.

        Every window begins with `<bos>`, which is never scored.
        """
        ids, length = np.array(self._plain(text), "int32"), self.max_length
        start_id, pairs, start = np.array([self.prefix_token_id], "int32"), [], 0
        while start < len(ids):
            end = min(start + (length if start == 0 else length - 1), len(ids))
            context = np.concatenate([start_id, ids[max(0, end - length) : start]])
            pairs.append((context, ids[start:end]))
            start = end
        return pairs

    # Likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and True if it is the greedy one."""
        pairs = self._likelihood_pairs(requests)
        args = [request.args for request in requests]
        return self._loglikelihood_tokens(
            [(arg, *pair) for arg, pair in zip(args, pairs, strict=True)]
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Any, Any]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for i, score in self.lm.continuation_scorer.score(pairs, self.report):
            answers[i] = score.log_probability, score.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, given `<bos>`."""
        windows = [self._windows(request.args[0]) for request in requests]
        owners = np.repeat(np.arange(len(windows)), [len(own) for own in windows])
        left, sums = np.bincount(owners, minlength=len(windows)), np.zeros(len(windows))
        pairs = [pair for own in windows for pair in own]
        for i, score in self.lm.continuation_scorer.score(pairs, self.report):
            owner = owners[i]
            sums[owner] += score.log_probability
            left[owner] -= 1
            if left[owner] == 0:
                request = requests[owner]
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", request.args, float(sums[owner])
                )
        return sums.tolist()

    def count_tokens(self, requests: list[Instance]) -> int:
        """Returns the number of tokens that `requests`, all of one type, read.

        For `generate_until`, this is the largest possible number, with the new tokens.
        """
        if not requests:
            return 0
        if requests[0].request_type == "generate_until":
            return sum(len(job.ids) + job.max_new_tokens for job in self._jobs(requests))
        if requests[0].request_type == "loglikelihood_rolling":
            pairs = [pair for request in requests for pair in self._windows(request.args[0])]
        else:
            pairs = self._likelihood_pairs(requests)
            self._counted |= zip((request.args for request in requests), pairs, strict=True)
        texts = [np.concatenate(pair) for pair in pairs]
        return token_tree(texts, [len(continuation) for _, continuation in pairs]).num_nodes

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the new text of each request, up to its first stop string."""
        answers = [""] * len(requests)
        jobs = sorted(self._jobs(requests), key=lambda job: (job.settings_key, len(job.ids)))
        for _, jobs_of_settings in groupby(jobs, key=lambda job: job.settings_key):
            group = list(jobs_of_settings)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                texts = self._generate(batch)
                for job, text in zip(batch, texts, strict=True):
                    answers[job.index] = text
                    args = requests[job.index].args
                    self.cache_hook.add_partial("generate_until", args, text)
                self.report(sum(len(job.ids) + job.max_new_tokens for job in batch))
        return answers

    def _jobs(self, requests: list[Instance]) -> list["Generation"]:
        jobs = []
        for index, request in enumerate(requests):
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, DEFAULT_MAX_NEW_TOKENS)
            space = self.max_length - settings["max_gen_toks"]
            if space < 1:
                raise ValueError(
                    f"The task {request.task_name!r} generates up to "
                    f"{settings['max_gen_toks']} tokens, but the model's context is "
                    f"{self.max_length}. Set a smaller max_gen_toks."
                )
            ids = self._fit(self.tok_encode(context), space, request)
            jobs.append(Generation(index, ids, settings["max_gen_toks"], json.dumps(settings)))
        return jobs

    def _generate(self, batch: list["Generation"]) -> list[str]:
        settings = json.loads(batch[0].settings_key)
        options: dict[str, Any] = {"sampler": "greedy"}
        if settings["do_sample"]:
            names = ("temperature", "top_k", "top_p", "min_p", "seed")
            options = {name: settings[name] for name in names if settings.get(name) is not None}
        stop = [term for term in settings["until"] if term]
        rows = self.lm.generate(
            [job.ids for job in batch],
            max_new_tokens=batch[0].max_new_tokens,
            stop=stop or None,
            strip_prompt=True,
            **options,
        )
        texts = self.lm.preprocessor.tokenizer.detokenize(rows, skip_special_tokens=True)
        return [postprocess_generated_text(text, stop, None) for text in texts]

    # Chat

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation in the format of Gemma's instruction-tuned models.

        A system message is added to the first user turn. If `add_generation_prompt` is False, the
        last message is the beginning of the model's answer, and its turn is not closed.
        """
        tokenizer = self.lm.preprocessor.tokenizer
        turns, beginning = list(chat_history), ""
        if not add_generation_prompt:
            beginning = turns.pop()["content"]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer.apply_chat_template(turns)
        self._templates[text.removesuffix("\n")] = np.array(ids, "int32")
        return text + beginning

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return CHAT_TEMPLATE if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Name of the vocabulary, for lm-eval's cache of requests."""
        return f"keras_gemma_{self.lm.preprocessor.tokenizer.vocabulary_size()}"

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval's results say about the model."""
        backbone = self.lm.backbone
        return {
            "model_num_parameters": backbone.config.parameter_count,
            "model_dtype": backbone.compute_dtype,
            "keras_gemma_version": __version__,
            "keras_backend": keras.backend.backend(),
        }


class Generation(NamedTuple):
    """A text to be continued."""

    index: int  # of its request
    ids: list[int]
    max_new_tokens: int
    settings_key: str  # lm-eval's settings, as JSON
