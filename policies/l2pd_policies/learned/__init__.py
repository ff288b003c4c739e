"""What policies with trained filters share: the filter and its folder, the policy, the training."""
