// SPDX-License-Identifier: MIT
/*
 * ringhold TRUTH WAY COUNT: uses a UDP socket that it has only through an io_uring.
 * Then it gives the socket up in that way: exit, close, unregister, update, exec,
 * op_close or op_update. A child has the only descriptor, and never uses it. It
 * reports the port, then that the socket is the child's, and waits for an answer to
 * each.
 * - one_of_two, ring_fd, thread: it still has the socket. The thread has a table of
 *   its own, and the ring in it.
 * - waits: it exits without a use since it closed its descriptor.
 * Datagrams before that have 5 bytes, those after it 6.
 *
 * ringhold TRUTH direct PORT: sends to PORT of 127.0.0.1 from a socket that never had
 * a descriptor. It closes a range of others, reports that, and waits for an answer.
 */
#include "truth.h"
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#ifndef __NR_close_range
#define __NR_close_range 436
#endif

struct ring {
	int fd;
	unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
};

static int enter_with(int sock, int number, struct ring *ring)
{
	struct io_uring_params p = { 0 };
	char *sq, *cq;

	ring->fd = syscall(__NR_io_uring_setup, 8, &p);
	if (ring->fd < 0)
		return -errno;
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(unsigned), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe),
		  PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
	ring->sqes = mmap(NULL, p.sq_entries * sizeof(*ring->sqes), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || ring->sqes == MAP_FAILED)
		fail("mmap");
	ring->sq_tail = (void *)(sq + p.sq_off.tail);
	ring->sq_mask = (void *)(sq + p.sq_off.ring_mask);
	ring->sq_array = (void *)(sq + p.sq_off.array);
	ring->cq_head = (void *)(cq + p.cq_off.head);
	ring->cq_tail = (void *)(cq + p.cq_off.tail);
	ring->cq_mask = (void *)(cq + p.cq_off.ring_mask);
	ring->cqes = (void *)(cq + p.cq_off.cqes);
	if (syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_FILES, &sock, number))
		fail("register");
	return 0;
}

/* Has one operation done; returns what it says. */
static int operate(struct ring *ring, const struct io_uring_sqe *sqe)
{
	unsigned tail = *ring->sq_tail, index = tail & *ring->sq_mask, head = *ring->cq_head;
	int result;

	ring->sqes[index] = *sqe;
	ring->sq_array[index] = index;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		fail("io_uring_enter");
	while (__atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) == head)
		usleep(1000);
	result = ring->cqes[head & *ring->cq_mask].res;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return result;
}

/* Looks for a datagram, and takes none. */
static void use(struct ring *ring)
{
	static char data[8];

	operate(ring, &(struct io_uring_sqe){
		.opcode = IORING_OP_RECV, .flags = IOSQE_FIXED_FILE, .addr = (uintptr_t)data,
		.len = sizeof(data), .msg_flags = MSG_DONTWAIT,
	});
}

/* Has the ring forget the file in its first place by an operation of its own. */
static void forget(struct ring *ring, int opcode)
{
	int nothing = -1, result;

	if (opcode == IORING_OP_CLOSE)
		result = operate(ring, &(struct io_uring_sqe){ .opcode = opcode, .file_index = 1 });
	else
		result = operate(ring, &(struct io_uring_sqe){
			.opcode = opcode, .fd = -1, .addr = (uintptr_t)&nothing, .len = 1,
		});
	if (result < 0) {
		errno = -result;
		fail("operation");
	}
}

/* Can this kernel do what @way wants? 0, or the error. */
static int can(struct ring *ring, const char *way)
{
	struct io_uring_rsrc_update update = { .offset = -1U, .data = ring->fd };

	/* a kernel without file numbers of the ring's own tries to close the descriptor */
	if (!strcmp(way, "op_close") && operate(ring, &(struct io_uring_sqe){
			.opcode = IORING_OP_CLOSE, .fd = -1, .file_index = 1 }) == -EBADF)
		return -EOPNOTSUPP;
	/* the ring gets a number by which it is known without its descriptor */
	if (!strcmp(way, "ring_fd") &&
	    syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_RING_FDS, &update, 1) != 1)
		return -errno;
	return 0;
}

/* A socket that has no descriptor at any time. */
static int direct(int port)
{
	struct sockaddr_in peer = loopback(port);
	struct ring ring;
	int result = enter_with(-1, 1, &ring);

	if (!result)
		result = operate(&ring, &(struct io_uring_sqe){
			.opcode = IORING_OP_SOCKET, .fd = AF_INET, .off = SOCK_DGRAM,
			.file_index = 1,
		});
	if (result) {
		tell(result);
		return 0;
	}
	result = operate(&ring, &(struct io_uring_sqe){
		.opcode = IORING_OP_CONNECT, .flags = IOSQE_FIXED_FILE, .addr = (uintptr_t)&peer,
		.off = sizeof(peer),
	});
	if (result || operate(&ring, &(struct io_uring_sqe){
			.opcode = IORING_OP_SEND, .flags = IOSQE_FIXED_FILE,
			.addr = (uintptr_t)"hello", .len = 5,
		}) != 5)
		fail("send");
	if (syscall(__NR_close_range, 1000, 2000, 0))
		fail("close_range");
	tell(0);
	hear();
	return 0;
}

static void has_it(int sock, int count)
{
	truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1, .len = 34 });
	tell(0);
	hear();
}

static void child(int sock, struct ring *ring, int gone, int count)
{
	pid_t parent = getppid();
	char c = 0;

	close(ring->fd);
	/* its descriptors go before it has ended */
	switch (read(gone, &c, 1)) {
	case 0:
		while (getppid() == parent)
			usleep(1000);
		break;
	case 1:
		break;
	default:
		fail("pipe");
	}
	if (c != 's')
		has_it(sock, count);
	_exit(0);
}

/* Is it its own to the end? */
static int keeps(const char *way)
{
	return !strcmp(way, "one_of_two") || !strcmp(way, "ring_fd") || !strcmp(way, "thread");
}

static int play(char **argv)
{
	struct sockaddr_in own;
	socklen_t size = sizeof(own);
	struct io_uring_files_update update;
	struct ring ring, other;
	int sock, copy, count, gone[2], nothing = -1, result;
	char number[16], *way = argv[2];
	pid_t pid;

	count = atoi(argv[3]);
	if (!strcmp(way, "executed")) {
		if (write(count, "g", 1) != 1 || wait(&result) < 0)
			fail("child");
		return result != 0;
	}
	truth_open(argv);
	if (!strcmp(way, "direct"))
		return direct(count);
	sock = bound(SOCK_DGRAM, 0);
	if (getsockname(sock, (void *)&own, &size) || pipe(gone))
		fail("getsockname");
	result = enter_with(sock, 1, &ring) ?: can(&ring, way);
	if (result) {
		tell(result);	/* the stage says that this kernel cannot */
		return 0;
	}
	pid = fork();
	if (pid < 0)
		fail("fork");
	if (!pid) {
		close(gone[1]);
		child(sock, &ring, gone[0], count);
	}
	if (!strcmp(way, "one_of_two") && enter_with(sock, 1, &other))
		fail("second ring");
	truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1, .len = 33 });
	if (keeps(way))
		truth_claim(sock, (struct claim){ .proto = "udp", .in = count, .exact = 1,
						  .len = 34 });
	close(sock);
	if (strcmp(way, "waits"))
		use(&ring);
	tell(ntohs(own.sin_port));
	hear();
	if (!strcmp(way, "exit") || !strcmp(way, "waits"))
		return 0;
	if (!strcmp(way, "close")) {
		close(ring.fd);
	} else if (!strcmp(way, "unregister")) {
		if (syscall(__NR_io_uring_register, ring.fd, IORING_UNREGISTER_FILES, NULL, 0))
			fail("unregister");
	} else if (!strcmp(way, "update")) {
		update = (struct io_uring_files_update){ .fds = (uintptr_t)&nothing };
		if (syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_FILES_UPDATE,
			    &update, 1) != 1)
			fail("update");
		/* the ring lets go of it a second later */
		sleep(5);
	} else if (!strcmp(way, "op_close") || !strcmp(way, "op_update")) {
		/* what the module may have wanted to look at since the ring was made */
		sleep(5);
		forget(&ring, strcmp(way, "op_close") ? IORING_OP_FILES_UPDATE : IORING_OP_CLOSE);
		sleep(5);
	} else if (!strcmp(way, "exec")) {
		copy = dup(gone[1]);
		snprintf(number, sizeof(number), "%d", copy);
		execl("/proc/self/exe", argv[0], argv[1], "executed", number, NULL);
		fail("exec");
	} else if (keeps(way)) {
		if (strcmp(way, "thread"))
			close(ring.fd);
		tell(0);
		hear();
		if (write(gone[1], "s", 1) != 1)
			fail("pipe");
		return 0;
	}
	if (write(gone[1], "g", 1) != 1 || waitpid(pid, &result, 0) != pid)
		fail("child");
	return result != 0;
}

/* The first thread keeps a table of its own, which has none of it. */
static void *apart(void *argv)
{
	static int result;

	if (unshare(CLONE_FILES))
		fail("unshare");
	result = play(argv);
	return &result;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	void *result;

	if (argc != 4)
		return 2;
	if (strcmp(argv[2], "thread"))
		return play(argv);
	if (pthread_create(&thread, NULL, apart, argv) || pthread_join(thread, &result))
		fail("thread");
	return *(int *)result;
}
