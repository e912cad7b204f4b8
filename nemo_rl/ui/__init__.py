"""`nemo-rl ui`: a read-only web page of the jobs on a cluster and of the runs on this machine.

    listing.py    what the page shows of a job, whatever its source
    runs.py       the runs in folders of this machine
    cluster.py    the jobs that a viewer may see, and their logs, with the viewer's own rights
    app.py        the Starlette application: who may ask, and the four routes
    serve.py      the server of `nemo-rl ui`
    libraries.py  the JavaScript libraries of the page, fetched once and checked
    page/         the page itself: HTML, CSS and ES modules

The page has no state of its own, and nothing on it changes a job.
"""
