"""Rollouts by vLLM servers over HTTP. vLLM is never imported where a model is trained: it pins another torch.

In the trainer: `engine`, `client`, `server`, `weights`. In the server's interpreter, which needs nothing of the package but this folder: `serve`,
`plugin`, `middleware`, `receiver`.
"""
