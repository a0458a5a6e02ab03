"""HTTP: routes, limits, security and metrics around `relaxlm.openai_api`.

protocol.py   a connection: time for heads and for readers, number of connections
run.py        sockets, signals, and the end of a server
guard.py      a request: request ids, Host and Origin, API keys, unread bodies
body.py       a body: its size, its time, and strict JSON
watch.py      work for a client that may go away, run out of time, or meet the server's end
events.py     server-sent events
metrics.py    what Prometheus reads
app.py        the routes, put together
"""
