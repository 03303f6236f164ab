"""`firebox generate DIR` on a folder that transformers wrote, of every architecture: the ids of transformers'
greedy answer. And a server of a model that could see says that it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from firebox.find import load
from tests.e2e.conftest import serving
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint

ARCHITECTURES = (
    "glm4_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "kimi_k25",
    "qwen3_5_moe",
    "minimax_m2",
)
PROMPTS = (
    "def main(arguments):\n    return sum(len(word) for word in arguments)\n",
    "Seven engines stood in the shed, and one of them was warm.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610",
    "import json\nimport sys\n\nprint(json.dumps(sys.argv))\n",
)
TOKENS = 24
END = "<|end|>"
LEARNED = (
    "The firebox is the small chamber in which an engine's fire burns. Water stands around it, tubes lead "
    "the heat through the boiler, and whoever feeds it watches the gauge: too little and the train stands, "
    "too much and the valve opens. A good fire is thin, bright and even; it is fed little and often."
)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def write_folder(folder: Path, name: str) -> Path:
    """A TINY checkpoint of the architecture, with a tokenizer of just as many tokens."""
    config = load("models", name).TINY
    write_checkpoint(folder, config)
    vocab = config.get("text_config", config)["vocab_size"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LEARNED], trainer)
    assert tokenizer.get_vocab_size() == vocab and tokenizer.token_to_id(END) == 0
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, name)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    prompt, expected = lively_prompt(fast, folder)
    command = [sys.executable, "-m", "firebox", "generate", str(folder), "--prompt", prompt, "--json"]
    done = subprocess.run(
        [*command, "--max-tokens", str(TOKENS), "--temperature", "0"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["prompt_ids"] == fast.encode(prompt)
    assert document["ids"] == expected
    assert document["finish_reason"] == ("length" if len(expected) == TOKENS else "stop")
    assert document["text"] == fast.decode(document["ids"])


def lively_prompt(tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[str, list[int]]:
    """The first prompt after which transformers writes on for at least 8 tokens, 5 different ones among them,
    and what it writes: random weights end where they please."""
    reference = load_reference(folder)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert len(ids) > 30
        written = reference_greedy(reference, ids, TOKENS)
        written = written[: written.index(0)] if 0 in written else written
        if len(written) >= 8 and len(set(written)) > 4:
            return prompt, written
    raise AssertionError("every prompt is too short or too dull to prove anything")


def test_an_image_is_refused_by_a_server_of_kimi_k25(tmp_path: Path) -> None:
    """Its checkpoint has a vision tower, which is not read."""
    text = {"type": "text", "text": "What is this?"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with serving(str(write_folder(tmp_path, "kimi_k25"))) as server:

        def ask(*parts: object) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)

        refused = ask(text, image)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == "messages.0.content.1.type"
        assert "'image_url'" in error["message"] and "no images" in error["message"]
        answered = ask(text)
        assert answered.status_code == 200
        assert answered.json()["usage"]["completion_tokens"] > 0
