"""`abyssal serve`: a model behind an OpenAI-compatible address (extra: serve).

request.py   what a request may say         prepare.py   prompt, limits, constraint
worker.py    the queue and its one thread   respond.py   whole answers and streams
replies.py   OpenAI's objects               app.py       routes and errors      run.py   address and signals
"""
