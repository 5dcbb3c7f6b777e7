"""Small tokenizers with chat templates in the styles that models use; written here, trained in the test."""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from preftune.data.chat import CHATML, PLAIN
from preftune.modeling.tokenizer import HubTokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog. Where is the nearest restaurant? It is behind the house.",
    "Once upon a time there was a small cat who liked to sing. user assistant system tool You are helpful.",
    "Answer in one word, please: yes or no? No, thank you. 1 2 3 4 5 6 7 8 9 0 \n\n - list\n - list",
    "think about it step by step and then say the answer, because the answer is what counts",
]

# The pattern of Llama 3 and Qwen, but for contractions.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)
GEMMA = (
    "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}"
    "{%- elif m['role'] == 'assistant' -%}{{- ' ' + m['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}{%- endif -%}{%- endfor -%}"
)
# Like Phi-3: the turn's end, and at the end of a whole conversation another token.
TWO_ENDS = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"
)
# Like Qwen 3: reasoning is taken out of earlier answers, and the last answer always has a reasoning block.
THINKING = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = m['content'] -%}{%- set reasoning = '' -%}"
    "{%- if m['role'] == 'assistant' and '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- if m['role'] == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Like DeepSeek R1: the generation prompt opens the reasoning, the answer's rendering has none.
OPENED = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- '<|User|>' + m['content'] -}}"
    "{%- else -%}{{- '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}"
)
# Like Qwen 2.5 with tools: calls are written into the assistant's turn, results come as their own turn.
TOOLS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] -}}"
    "{%- for call in m['tool_calls'] or [] -%}{{- '\\n<tool_call>' + call['function']['name'] + '</tool_call>' -}}{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# name: (template, special tokens, beginning, end)
KINDS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>"),
    "plain": (PLAIN, ["</s>"], None, "</s>"),
    "plain-bos": (PLAIN, ["<s>", "</s>"], "<s>", "</s>"),
    "llama3": (LLAMA3, ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<s>", "<|eot_id|>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "two-ends": (TWO_ENDS, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], None, "<|endoftext|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], None, "<|im_end|>"),
    "opened": (OPENED, ["<s>", "</s>", "<|User|>", "<|Assistant|>"], "<s>", "</s>"),
    "tools": (TOOLS, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "chatml-as-text": (CHATML, ["</s>"], None, "</s>"),  # a base model without the template's special tokens
}


class Plain(HubTokenizer):
    """The hub tokenizer with exactly the end tokens that a test states."""

    def __init__(self, raw, eos_ids, name="test"):
        super().__init__(raw, eos_ids, name)
        self.__dict__["eos_ids"] = frozenset(eos_ids)


@cache
def tokenizer_of(kind: str) -> HubTokenizer:
    template, special, beginning, end = KINDS[kind]
    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXT, trainer)
    raw = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=beginning, eos_token=end, clean_up_tokenization_spaces=False)
    raw.chat_template = template
    ends = {end, *({"<end_of_turn>"} if kind == "gemma" else set()), *({"<|end|>"} if kind == "two-ends" else set())}
    return Plain(raw, sorted(raw.convert_tokens_to_ids(token) for token in ends), kind)
