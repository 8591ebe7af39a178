"""A fast, exact inner loop for latent adversarial training."""
