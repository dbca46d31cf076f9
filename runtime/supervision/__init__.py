"""What happens when a rank is lost: who is told, what is started again, what is reported.

restart      the policy a user declares, and the state machine that follows it (pure)
health       which part of a mesh is whole (pure)
reports      one report per root cause, with what followed from it beneath (pure)
waits        which actors wait for each other in a circle (pure)
slots        what an actor's slot is blocked on
wait_watch   a process's part in finding such circles
owned        what a process has ordered and spawned, and what makes it again
tree         the way up: owners are asked, at last the script
asking       one question to an owner's __supervise__
supervisor, actor_supervisor        hear of losses in what is owned, and carry out policies
elastic      meshes with holes: what is whole, filling by hand
root, hook   the controller's end of the tree: reports, unhandled_fault_hook
"""
