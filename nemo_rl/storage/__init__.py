"""Object stores and local folders by one small interface: nobody else in nemo-rl talks to a store.

`Store` reads and writes objects below one address, with conditional writes; `transfer` moves whole folders, in parallel and
verified; `cache` keeps what was read once per machine. Stores are reached through obstore (the extra `object-storage`).
Loads no torch.
"""
