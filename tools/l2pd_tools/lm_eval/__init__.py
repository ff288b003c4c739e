"""Diffusion language models in EleutherAI's lm-evaluation-harness, with any unmask policy.

python -m l2pd_tools.lm_eval --model l2pd --model_args pretrained=MODEL,unmask_policy=learn2pd \
    --tasks gsm8k --batch_size 16

The command-line arguments are the harness's own; docs/evaluation.md describes those of the model.
"""
