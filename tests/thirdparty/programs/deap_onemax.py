"""DEAP evolves the same population with a pool's map as with its own."""

import random

from deap import algorithms, base, creator, tools

import fiber

creator.create("Most", base.Fitness, weights=(1.0,))
creator.create("Individual", list, fitness=creator.Most)


def ones(individual):
    return (sum(individual),)


toolbox = base.Toolbox()
toolbox.register("bit", random.randint, 0, 1)
toolbox.register("individual", tools.initRepeat, creator.Individual, toolbox.bit, 40)
toolbox.register("population", tools.initRepeat, list, toolbox.individual)
toolbox.register("evaluate", ones)
toolbox.register("mate", tools.cxTwoPoint)
toolbox.register("mutate", tools.mutFlipBit, indpb=0.05)
toolbox.register("select", tools.selTournament, tournsize=3)


def evolve():
    random.seed(1)
    population, _ = algorithms.eaSimple(
        toolbox.population(60), toolbox, cxpb=0.5, mutpb=0.2, ngen=15, verbose=False
    )
    return population


if __name__ == "__main__":
    alone = evolve()
    with fiber.Pool(2) as pool:
        toolbox.register("map", pool.map)
        together = evolve()
    print("same population:", together == alone)
    print("best:", max(individual.fitness.values[0] for individual in together))
