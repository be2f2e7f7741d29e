"""torch, transformers and peft, and nothing of federation: load, adapt, fit, embed, evaluate."""
