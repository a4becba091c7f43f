"""A sweep over the architectures of transformers: the library's terms against the same terms made by hand.

``architectures`` lists the classes, ``shrink`` makes their configs tiny by rules and ``settings`` has what the rules
don't get right, ``batches`` makes ragged inputs and ``build`` a random teacher and student that run on them.
``reference`` is what plain runs of these give, ``by_hand`` the terms as loops over it, and ``cells`` compares them
with the library. ``__main__`` runs all that, each class in a process of its own, and ``page`` writes the tables.
"""
