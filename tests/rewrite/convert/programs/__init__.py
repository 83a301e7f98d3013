"""Random forwards: programs that build a module, run converted and plain.

``statements`` knows what may stand in a forward, ``source`` puts statements together and prints the
module, ``judge`` runs it both ways and says where the two differ, and makes it smaller.
``python -m tests.rewrite.convert.programs --count 5000`` runs many.
"""
