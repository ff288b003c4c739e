"""The policies that come with the project. This module only names them and imports no torch."""

from __future__ import annotations

from l2pd_plugins import PolicySpec, hookimpl


@hookimpl
def l2pd_policies() -> list[PolicySpec]:
    """The built-in policies."""
    return [
        PolicySpec(
            name="fixed_schedule",
            factory="l2pd_policies.fixed_schedule:FixedSchedule",
            summary="LLaDA's low-confidence remasking: the k most confident tokens per step",
            api_version=1,
        ),
        PolicySpec(
            name="random_order",
            factory="l2pd_policies.random_order:RandomOrder",
            summary="LLaDA's random remasking: k positions drawn at random per step",
            api_version=1,
        ),
        PolicySpec(
            name="confidence_threshold",
            factory="l2pd_policies.confidence_threshold:ConfidenceThreshold",
            summary="Fast-dLLM's rule: every token whose confidence reaches the threshold",
            api_version=1,
        ),
        PolicySpec(
            name="fast_dllm_factor",
            factory="l2pd_policies.fast_dllm_factor:FastDLLMFactor",
            summary="Fast-dLLM's factor rule: tokens taken together must be more confident",
            api_version=1,
        ),
        PolicySpec(
            name="frechet",
            factory="l2pd_policies.frechet:Frechet",
            summary="Fast-dLLM++: Frechet bounds on the joint probability",
            api_version=1,
        ),
        PolicySpec(
            name="eb_sampler",
            factory="l2pd_policies.eb_sampler:EBSampler",
            summary="EB-Sampler: lowest entropies within a bound",
            api_version=1,
        ),
        PolicySpec(
            name="klass",
            factory="l2pd_policies.klass:Klass",
            summary="KLASS: confident and stable in KL divergence",
            api_version=1,
        ),
        PolicySpec(
            name="credit",
            factory="l2pd_policies.credit:Credit",
            summary="CreditDecoding: repeated predictions gain confidence",
            api_version=1,
        ),
        PolicySpec(
            name="cora",
            factory="l2pd_policies.cora:Cora",
            summary="CORA-Diff: confident, with the same prediction as the step before",
            api_version=1,
        ),
        PolicySpec(
            name="local_leap",
            factory="l2pd_policies.local_leap:LocalLeap",
            summary="LocalLeap: a lower threshold near confident anchors",
            api_version=1,
        ),
        PolicySpec(
            name="hierarchy",
            factory="l2pd_policies.hierarchy:Hierarchy",
            summary="hierarchy decoding: the best of every run of masks",
            api_version=1,
        ),
        PolicySpec(
            name="dream_confidence",
            factory="l2pd_policies.dream:DreamConfidence",
            summary="Dream's order by confidence, with its schedule",
            api_version=1,
        ),
        PolicySpec(
            name="dream_margin",
            factory="l2pd_policies.dream:DreamMargin",
            summary="Dream's order by margin, with its schedule",
            api_version=1,
        ),
        PolicySpec(
            name="dream_entropy",
            factory="l2pd_policies.dream:DreamEntropy",
            summary="Dream's order by entropy, with its schedule",
            api_version=1,
        ),
        PolicySpec(
            name="ccd",
            factory="l2pd_policies.ccd:CCD",
            summary="CCD: positions that two consecutive steps rank high with the same token",
            api_version=1,
        ),
        PolicySpec(
            name="sched",
            factory="l2pd_policies.sched:SchED",
            summary="SchED: the whole block once its margin reaches a falling threshold",
            api_version=1,
        ),
        PolicySpec(
            name="pc_sampler",
            factory="l2pd_policies.pc_sampler:PCSampler",
            summary="PC-Sampler: informative tokens and early positions first",
            api_version=1,
        ),
        PolicySpec(
            name="saber",
            factory="l2pd_policies.saber:Saber",
            summary="Saber: above the mean confidence so far; remasks the largest losses",
            api_version=1,
        ),
        PolicySpec(
            name="llada2_edit",
            factory="l2pd_policies.llada2_edit:LLaDA2Edit",
            summary="LLaDA2.1: a threshold that also edits committed tokens",
            api_version=1,
        ),
        PolicySpec(
            name="leftmost_threshold",
            factory="l2pd_policies.leftmost_threshold:LeftmostThreshold",
            summary="Fork-dLLM: a threshold, else the leftmost mask",
            api_version=1,
        ),
        PolicySpec(
            name="learn2pd",
            factory="l2pd_policies.learn2pd:Learn2PD",
            summary="a small learned filter over the block's confidences (arXiv 2509.25188)",
            api_version=1,
        ),
        PolicySpec(
            name="settled",
            factory="l2pd_policies.settled:Settled",
            summary="a learned convolution over cheap signals, for any block length",
            api_version=1,
        ),
        PolicySpec(
            name="transformer_sampler",
            factory="l2pd_policies.transformer_sampler:TransformerSampler",
            summary="positions drawn by a learned transformer layer (arXiv 2512.09106)",
            api_version=1,
        ),
        PolicySpec(
            name="oracle",
            factory="l2pd_policies.oracle:Oracle",
            summary="extremely greedy parallel: tokens that equal a reference decode; the rule "
            "that learn2pd's filter imitates, and its upper bound",
            api_version=1,
        ),
    ]
