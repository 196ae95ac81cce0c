"""A small Qwen3 from scratch, with a tokenizer trained on the environment's own texts.

For machines without a GPU and for tests: everything about it is an ordinary transformers model, so
whatever works here works with a pretrained one. The tokenizer never merges across lines, so that a
frequent line of an observation (a grid row) becomes one token: per-cell tokens learn far worse.
Where names are to be copied out of sentences, ``pieces: words`` makes one token of "desk 1".
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from agentdistill import actions
from agentdistill.config import PromptConfig, TinyModel, TokenizerConfig
from agentdistill.envs.base import TextEnv
from agentdistill.policy import derive_seed
from agentdistill.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_PLAIN = PromptConfig()

_PIECES = {"lines": r"[^\n]*\n|[^\n]+", "words": r" ?[^\W\d]\w*(?: \d+)?| ?\d+| ?[^\s\w]+|\s"}
"""What merges stay within, by :attr:`TokenizerConfig.pieces`; every character is in one piece."""

SYSTEM, USER, ASSISTANT, END, PAD = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Two tokens of overhead a turn, prefix-preserving, with generation marks for trl's SFT."""


def corpus(
    env: TextEnv, grammar: str, episodes: int, seed: int, prompt: PromptConfig = _PLAIN
) -> Iterator[str]:
    """Texts of ``episodes`` training episodes, half random and half expert, as ``prompt`` says."""
    words = Wording(prompt, env.instruction)
    yield env.instruction
    if words.system not in ("", env.instruction):
        yield words.system
    tasks = islice(env.tasks(env.card.splits[0], seed=derive_seed(seed, "corpus")), episodes)
    for number, task in enumerate(tasks):
        observation, _ = env.reset(options={"task": task})
        generator = random.Random(derive_seed(seed, "corpus", number))
        past: list[str] = []
        for step in range(1, env.step_limit + 1):
            expert = env.expert_action() if number % 2 else None
            choices = env.admissible() or ["wait"]
            history = "".join(past[words.first(len(past)) :])
            yield words.message(
                observation, step=step, goal=env.goal, admissible=choices, history=history
            )
            action = expert or generator.choice(choices)
            yield actions.write(grammar, (action,))
            past.append(words.entry(observation, (action,), step=step))
            result = env.act(action)
            observation = result.observation
            if result.terminated or result.truncated:
                break
        yield observation


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE over ``texts`` with the chat template above; lossless on any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, SYSTEM, USER, ASSISTANT]
    # A text that spells a special token must not teach a merge of letters that ends in its id.
    spelled = re.compile("|".join(map(re.escape, special)))
    valid = (text.encode(errors="replace").decode() for text in texts)  # no lone surrogates
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES[config.pieces]), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for text in valid for p in spelled.split(text)), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build(config: TinyModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A randomly initialised model; the same seed gives the same weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.feed_forward or 3 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden // config.heads,
        max_position_embeddings=8192,
        initializer_range=config.init_std,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(architecture)
