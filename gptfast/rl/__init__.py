"""Reinforcement learning from answers that are scored.

grpo        what is learned from sampled answers
config      what train/rl.py can be told
rollouts    the model that is trained, as it answers
loader      answers and their advantages, a step at a time
evaluation  pass@k
"""
