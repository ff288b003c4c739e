"""Answers of `llada2_edit` that go on after an end of text, as the transformers adapter has them.

A row that ignores the end of text may edit an end-of-text token like any other; a row that does not
may not (`_editable` in l2pd_plugins/denoising.py). The prompts are such that both cases occur.
"""

import torch

from l2pd_adapters.huggingface import load, loop

POLICY = {"name": "llada2_edit", "threshold": 0.9, "edit_threshold": 0.0}
PROMPTS = {
    "tiny-sdar": (
        "Shuffle: lbypadtjiqw",
        "Shuffle: dztnhivw",
        "Dial: 0u.D.d.d.D.D.u.U.u.u.U.d.u.D.",
    ),
    "tiny-llada": ("Book: Max, room 82, 1 hours", "Dial: 6u.d.u.d.d.d.D.d.D.d.D.D.u.u.u."),
}
END, MAX_NEW_TOKENS = 96, 90


def answers(model_name):
    """(templated prompt, its token ids, the answer that ignores the end of text, the one that ends
    with it) of each prompt; in every first answer an end-of-text token is edited, in no second one.
    """
    model, tokenizer = load(model_name, dtype=torch.float32)
    found = []
    for prompt in PROMPTS[model_name]:
        templated = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(templated, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = []
        for rule, edited in (("off", True), ("block", False)):
            with EditsOfEnd() as edits:
                out = model.generate(
                    input_ids=ids,
                    max_new_tokens=MAX_NEW_TOKENS,
                    unmask_policy="llada2_edit",
                    unmask_options={k: v for k, v in POLICY.items() if k != "name"},
                    end_of_text=rule,
                    return_dict_in_generate=True,
                )
            assert (edits.count > 0) is edited, (prompt, rule)
            tokens = out.sequences[0, ids.shape[1] :].tolist()
            made.append(tokens if rule == "off" else tokens[: int(out.trace.length[0])])
        found.append((templated, ids[0].tolist(), *made))
    return found


class EditsOfEnd:
    """Counts the end-of-text tokens that the transformers adapter's steps edit."""

    def __enter__(self):
        self.count, self.step = 0, loop.denoising_step

        def stepped(block, *args, **kwargs):
            before = (block.tokens == END) & ~block.masked
            outcome = self.step(block, *args, **kwargs)
            self.count += int((outcome.committed & before).sum())
            return outcome

        loop.denoising_step = stepped
        return self

    def __exit__(self, *_):
        loop.denoising_step = self.step
