"""Runs that are kept in an object store: this machine works in a folder, and what is whole there is published.

    s3://bucket/run/run.json                       the head: who writes, the run's record, every complete checkpoint with the
                                                   names, sizes and digests of its files
                    metrics.jsonl, completions.jsonl, run.log
                    latest, best                   which checkpoint they are
                    checkpoints/step-00000100-g1/  as on a disk, and manifest.json; g1: written under the first lease

Publishing is one conditional write of the head, which names the version that it replaces: compare and swap. The lease is the
head's `generation`, the fence. Who takes it writes the head, and from then on every publication of an earlier holder is
refused by the store, whenever it wakes up. Files of a checkpoint have the generation in their folder's name, so that two
holders never write the same object; the small files that are written again and again end in blanks that spell the generation,
so that their versions (on S3: digests of the content) differ between holders, and are written conditionally as well. What a
killed writer left behind is in no head, and is cleared away by the next one.

Nobody can ask a machine that is silent whether it is dead. A holder writes its head every few seconds; one of another machine
that did so for half a minute no more gives way. An attempt of a job gives way to later ones at once. Loads no torch.
"""
