"""`abyssal chat`: a conversation in the terminal, with tools from a Python file that run only when the user says so.

conversation.py   messages, and the cache kept between turns      tools.py   functions as tools
screen.py         what is shown, and how                          talk.py    turns and commands
visible.py        text of others on a terminal
"""
