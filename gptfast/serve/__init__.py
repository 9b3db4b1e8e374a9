"""The chat server: one engine a GPU behind an OpenAI-compatible API, and a page to talk to it.

page.html    all of the page; talks to the API like any other client
app.py       the endpoints
events.py    streams to clients who may leave at any time
guard.py     what is refused before it reaches the endpoints; where a server may listen
protocol.py  bodies, limits and errors
pool.py      the queue, and who answers what: lives on the event loop
worker.py    an engine that answers: a process of its own on each GPU
server.py    from start to graceful end
"""
