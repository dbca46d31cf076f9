"""What happens when a rank is lost: who is told, what is started again, what is reported.

restart      the policy a user declares, and the state machine that follows it (pure)
health       which part of a mesh is whole (pure)
reports      one report per root cause, with what followed from it beneath (pure)
waits        which actors wait for each other in a circle (pure)
slots        what an actor's slot is blocked on
wait_watch   a process's part in finding such circles
supervisor   a process's part in the tree: hears of losses, asks owners, carries out policies
"""
