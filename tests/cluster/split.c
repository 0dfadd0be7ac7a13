/* What selftest.sh runs to see that MPI works across the cluster's nodes: every rank finds the ranks on its own
 * node (MPI_COMM_TYPE_SHARED), all agree on the number of nodes, and a few megabytes go round the ring of ranks.
 * Rank 0 prints "RANKS ranks NODES nodes PER_NODE per node".
 * With LATE_RANK=n in the environment Slurm's rank n comes a second late, which the others must wait for. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { RING_BYTES = 4 << 20 };

static int ring_delivers(int rank, int size) {
    char *out = malloc(RING_BYTES), *in = malloc(RING_BYTES);
    int left = (rank + size - 1) % size;
    for (int i = 0; i < RING_BYTES; i++) out[i] = (char)(i * 31 + rank);
    MPI_Sendrecv(out, RING_BYTES, MPI_CHAR, (rank + 1) % size, 0, in, RING_BYTES, MPI_CHAR, left, 0,
                 MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    int good = 1;
    for (int i = 0; i < RING_BYTES; i++) good &= in[i] == (char)(i * 31 + left);
    free(out);
    free(in);
    return good;
}

static void be_late(void) {
    const char *late = getenv("LATE_RANK"), *rank = getenv("SLURM_PROCID");
    if (late && rank && atoi(late) == atoi(rank)) sleep(1);
}

int main(int argc, char **argv) {
    be_late();
    MPI_Init(&argc, &argv);
    int rank, size, local_rank, local_size, nodes, all_good;
    MPI_Comm node;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node);
    MPI_Comm_rank(node, &local_rank);
    MPI_Comm_size(node, &local_size);
    int leader = local_rank == 0, good = ring_delivers(rank, size);
    MPI_Allreduce(&leader, &nodes, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    MPI_Allreduce(&good, &all_good, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (rank == 0 && all_good) printf("%d ranks %d nodes %d per node\n", size, nodes, local_size);
    MPI_Finalize();
    return all_good ? 0 : 1;
}
