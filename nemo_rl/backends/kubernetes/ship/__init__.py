"""Carries the user's code and data to the pods, without a cluster client: what travels, and as which ConfigMaps.

`capture.capture` for rewards and callbacks, `data.ship_rows`, `ship_file` and `ship_directory` for data and models,
`archive.Archive` for what is applied. The pod's side is nemo_rl.worker.bundles.
"""
