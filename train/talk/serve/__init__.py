"""`abyssal serve`: a model behind an OpenAI-compatible address (extra: serve).

request.py   what a request may say         prepare.py      prompt, limits
worker.py    the queue and its one thread   respond.py      whole answers and streams
grammars.py  constraints, kept apart        nursery.py      the processes that have them
replies.py   OpenAI's objects               connections.py  how many, and how long each
app.py       routes and errors              run.py          address, signals and the log
"""
